"""Imports only ever point downwards, and each library stays in its own folder. Reads the source, imports nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "fedmira"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

# Highest first; the parts of one level do not import each other.
LEVELS = [
    {"cli", "flower_app"},
    {"api", "comparison", "federation", "plan", "resident", "saved", "simulation"},
    {"experiment", "node"},
    {"parts"},
    {"ranks", "results"},
    {"report"},
    {"rounds"},
    {"engines"},
    {"cards", "clients", "evaluation"},
    {"algorithms", "data", "model"},
    {"messages"},
    {"graphs"},
    {"adapters"},
    {"config"},
    {"errors"},
]
LEVEL_OF = {part: -level for level, parts in enumerate(LEVELS) for part in parts}

# Narrower than the levels: an algorithm neither trains nor sends, a report reads files.
ONLY_THESE = {
    "algorithms": {"adapters", "config", "errors", "graphs", "messages"},
    "report": {"config", "errors"},
}

# Library -> the only places that may import it.
HOMES = {
    "datasets": ("data/",),
    "flwr": ("engines/flower/", "flower_app.py"),
    "jinja2": ("report/", "data/prompts.py"),  # there: the error that a chat template raises
    "networkx": ("report/",),
    "peft": ("model/",),
    "rich": ("cli/",),
    "rouge": ("evaluation/",),
    "rouge_score": ("evaluation/",),
    "transformers": ("model/",),
    "typer": ("cli/",),
}
NOT_IN = {"report": {"torch"}}


def violations(root: Path) -> list[str]:
    """Every forbidden import below `root`, the folder of the package, as 'file:line: what is wrong'."""
    found = []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root).as_posix()
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            found += [f"{place}:{line}: {problem}" for problem in judge(place, name)]
    return found


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import, at any depth; `from package import part` counts as package.part."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            yield from ((node.lineno, f"{PACKAGE}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""


def judge(place: str, name: str) -> Iterator[str]:
    """What is wrong with importing `name` in the file at `place`."""
    part = place.partition("/")[0].removesuffix(".py")
    library, _, rest = name.partition(".")
    if name.startswith("."):
        yield f"relative import; write {PACKAGE}.<part> so that the direction can be seen"
    elif library == PACKAGE:
        yield from judge_direction(part, rest.partition(".")[0])
    elif library in HOMES and not place.startswith(HOMES[library]):
        yield f"{library} may only be imported in {' or '.join(HOMES[library])}"
    elif library in NOT_IN.get(part, ()):
        yield f"{part} must work without {library}"


def judge_direction(part: str, target: str) -> Iterator[str]:
    if part == target or part not in LEVEL_OF:  # the package's own __init__ may offer anything
        return
    if target not in LEVEL_OF:
        if target and not target.startswith("__"):
            yield f"{target} is on no level; add it to LEVELS"
    elif LEVEL_OF[target] > LEVEL_OF[part]:
        yield f"{part} imports {target}, which is above it"
    elif LEVEL_OF[target] == LEVEL_OF[part]:
        yield f"{part} imports its sibling {target}"
    elif part in ONLY_THESE and target not in ONLY_THESE[part]:
        yield f"{part} may only import {', '.join(sorted(ONLY_THESE[part]))}, not {target}"


def test_imports_point_downwards_and_libraries_stay_at_home() -> None:
    assert violations(SOURCE) == []


def test_every_part_of_the_package_is_on_a_level() -> None:
    # bundled holds files, and is no code
    parts = {path.name.removesuffix(".py") for path in SOURCE.iterdir() if path.suffix == ".py" or any(path.rglob("*.py"))}
    assert parts - set(LEVEL_OF) - {"__init__", "__main__"} == set()


@pytest.mark.parametrize(
    ("place", "code", "problem"),
    [
        ("rounds/loop.py", "from fedmira.cli import main", "rounds imports cli, which is above it"),
        ("errors.py", "import fedmira.config", "errors imports config, which is above it"),
        ("errors.py", "from fedmira import config", "errors imports config, which is above it"),
        ("data/encoding.py", "def load():\n    from fedmira.model import base_model", "data imports its sibling model"),
        ("algorithms/mira.py", "if TYPE_CHECKING:\n    from fedmira.data import Example", "algorithms imports its sibling data"),
        ("report/tables.py", "from fedmira.messages import Reply", "report may only import config, errors, not messages"),
        ("report/tables.py", "import torch.nn", "report must work without torch"),
        ("engines/in_process.py", "import flwr", "flwr may only be imported in engines/flower/ or flower_app.py"),
        ("clients/worker.py", "from transformers.models import llama", "transformers may only be imported in model/"),
        ("evaluation/evaluate.py", "import peft as adapters", "peft may only be imported in model/"),
        ("data/sources/hub.py", "from ..encoding import encode", "relative import; write fedmira.<part> so that the direction can be seen"),
        ("cli/main.py", "from fedmira.utils import anything", "utils is on no level; add it to LEVELS"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, place: str, code: str, problem: str) -> None:
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code, encoding="utf-8")
    assert violations(tmp_path) == [f"{place}:{code.count(chr(10)) + 1}: {problem}"]


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("engines/flower/engine.py", "import flwr\nfrom fedmira.messages import Request"),
        ("flower_app.py", "from flwr.serverapp import ServerApp\nfrom fedmira.experiment import build"),
        ("algorithms/mira.py", "from fedmira.algorithms.base import Algorithm\nfrom fedmira.graphs import Graph"),
        ("report/html.py", "import jinja2\nfrom fedmira.report.read import Run\nfrom fedmira.config import Config"),
        ("__init__.py", "from fedmira.experiment import build"),
    ],
)
def test_an_import_that_points_downwards_is_allowed(tmp_path: Path, place: str, code: str) -> None:
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code, encoding="utf-8")
    assert violations(tmp_path) == []
