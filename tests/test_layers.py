"""Each room imports only the rooms it may, without circles, and each library stays at home.

This file imports nothing of the package.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = "fedmira"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

_BELOW_METHODS = {"adapters", "config", "errors", "graphs", "messages", "shown"}
_BELOW_CLIENTS = _BELOW_METHODS | {"data", "methods", "metrics", "model", "storage", "wire"}
_BELOW_RUNS = _BELOW_CLIENTS | {
    "atomic",
    "clients",
    "observers",
    "records",
    "report",
    "rounds",
    "seeds",
}
_BELOW_EXPERIMENT = _BELOW_RUNS | {"privacy", "runs"}

ALLOWED: Mapping[str, set[str]] = {
    "errors": set(),
    "shown": set(),
    "atomic": set(),
    "seeds": set(),
    "records": {"atomic", "errors"},
    "config": {"errors"},
    "adapters": {"errors", "seeds"},
    "messages": {"adapters"},
    "metrics": set(),
    "observers": {"errors", "shown"},
    "storage": {"adapters", "atomic", "errors", "messages", "records"},
    "wire": {"adapters", "errors", "messages", "shown"},
    "graphs": {"atomic", "config", "errors", "seeds"},
    "methods": _BELOW_METHODS - {"methods"},
    "data": {"atomic", "config", "errors", "records", "seeds", "storage"},
    "model": {"adapters", "atomic", "config", "data", "errors", "records", "storage"},
    "report": {"atomic", "errors", "metrics", "records", "shown"},
    "clients": _BELOW_CLIENTS - {"graphs"} | {"records", "seeds"},
    "rounds": {"adapters", "clients", "config", "errors", "messages", "methods", "seeds"},
    "privacy": {"adapters", "config", "errors", "messages", "rounds", "seeds", "wire"},
    "runs": _BELOW_RUNS - {"wire"} | {"privacy"},
    "experiment": _BELOW_EXPERIMENT,
    "fleet": _BELOW_EXPERIMENT | {"experiment"},
    "studies": _BELOW_EXPERIMENT | {"experiment", "fleet"},
    "federation": _BELOW_EXPERIMENT | {"experiment"},
    "api": {
        "config",
        "data",
        "errors",
        "experiment",
        "fleet",
        "model",
        "observers",
        "records",
        "runs",
        "studies",
    },
    "cli": {
        "api",
        "config",
        "data",
        "errors",
        "experiment",
        "federation",
        "fleet",
        "observers",
        "records",
        "report",
        "runs",
        "shown",
        "studies",
    },
    "flower_app": {"config", "errors", "federation", "observers", "shown", "wire"},
}
"""Room -> the rooms it may import; imports within functions and under TYPE_CHECKING count."""

INSIDE_MODEL: Mapping[str, set[str]] = {
    "base": set(),
    "lora": {"base"},
    "packed": {"base", "lora"},
    "training": {"base", "lora", "packed"},
    "generation": {"base", "lora", "packed"},
    "kinds": {"base", "lora", "packed", "training", "generation"},
}
"""The same for the rooms of model/."""

LOOSE_MODULES = 6
"""Most modules at the top of the package beside the rooms."""

# Library -> the only places that may import it.
HOMES = {
    "datasets": ("data/",),
    "dp_accounting": ("privacy/",),
    "flwr": ("federation/flower/", "flower_app.py"),
    "jinja2": ("report/", "data/rendering.py"),  # there: the error that a chat template raises
    "networkx": ("report/",),
    "pyarrow": ("data/",),
    "peft": ("model/",),
    "rich": ("cli/", "observers/progress.py"),
    "rouge": ("metrics/",),
    "rouge_score": ("metrics/",),
    "transformers": ("model/",),
    "typer": ("cli/",),
}
NOT_IN = {"report": {"torch"}}


def violations(root: Path) -> list[str]:
    """Every forbidden import below `root`, the folder of the package, as 'file:line: problem'."""
    found = []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root).as_posix()
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            found += [f"{place}:{line}: {problem}" for problem in judge(place, name)]
    return found


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import, at any depth; names from the package count with it."""
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
    room = place.partition("/")[0].removesuffix(".py")
    library, _, rest = name.partition(".")
    if name.startswith("."):
        yield f"relative import; write {PACKAGE}.<room> so that the direction can be seen"
    elif library == PACKAGE:
        yield from judge_room(room, rest.partition(".")[0])
        yield from judge_inside_model(place.split("/"), rest.split("."))
    elif library in HOMES and not place.startswith(HOMES[library]):
        yield f"{library} may only be imported in {' or '.join(HOMES[library])}"
    elif library in NOT_IN.get(room, ()):
        yield f"{room} must work without {library}"


def judge_room(room: str, target: str) -> Iterator[str]:
    if room == target or room not in ALLOWED:  # the package's own __init__ may offer anything
        return
    if target not in ALLOWED:
        if target and not target.startswith("__"):
            yield f"{target} is no room; add it to ALLOWED"
    elif target not in ALLOWED[room]:
        allowed = ", ".join(sorted(ALLOWED[room])) or "nothing"
        yield f"{room} may only import {allowed}, not {target}"


def judge_inside_model(place: list[str], target: list[str]) -> Iterator[str]:
    """Rooms of model/ name each other's modules, so that the direction can be seen."""
    if place[0] != "model" or target[0] != "model" or len(place) < 3:
        return
    room, other = place[1], target[1] if len(target) > 1 else ""
    if other != room and other not in INSIDE_MODEL[room]:
        allowed = ", ".join(f"model.{name}" for name in sorted(INSIDE_MODEL[room]))
        yield f"model.{room} may only import {allowed or 'nothing'}, not model.{other}".rstrip(".")


def modules(root: Path) -> dict[str, ast.Module]:
    """Dotted name of each module and package -> its syntax tree."""
    return {
        ".".join([PACKAGE, *path.relative_to(root).with_suffix("").parts]).removesuffix(
            ".__init__"
        ): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(root.rglob("*.py"))
    }


def edges(trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> the modules it imports; a name that a package hands on counts as its home's."""
    handed_on = {
        module: {
            alias.asname or alias.name: (node.module, alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module in trees
            for alias in node.names
        }
        for module, tree in trees.items()
    }

    def home(module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> str:
        if f"{module}.{name}" in trees:
            return f"{module}.{name}"
        further = handed_on[module].get(name)
        if further is None or further in seen:
            return module
        return home(*further, seen | {further})

    found: dict[str, set[str]] = {}
    for module, tree in trees.items():
        of_module = found.setdefault(module, set())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in trees:
                of_module |= {home(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                of_module |= {alias.name for alias in node.names if alias.name in trees}
        of_module.discard(module)
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The names along one circle, the first of them again at its end; empty where there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_rooms_import_what_they_may_and_libraries_stay_at_home() -> None:
    assert violations(SOURCE) == []


def test_rooms_are_in_no_circle() -> None:
    assert circle(ALLOWED) == [] and circle(INSIDE_MODEL) == []


def test_modules_are_in_no_circle() -> None:
    assert circle(edges(modules(SOURCE))) == []


def test_every_part_of_the_package_is_a_room() -> None:
    # bundled holds files, and is no code
    parts = {
        path.name.removesuffix(".py")
        for path in SOURCE.iterdir()
        if path.suffix == ".py" or any(path.rglob("*.py"))
    }
    assert parts - {"__init__", "__main__"} == set(ALLOWED)


def test_few_modules_are_loose_at_the_top() -> None:
    loose = {path.stem for path in SOURCE.glob("*.py")} - {"__init__", "__main__"}
    assert len(loose) <= LOOSE_MODULES


@pytest.mark.parametrize(
    ("place", "code", "problem"),
    [
        ("errors.py", "import fedmira.config", "errors may only import nothing, not config"),
        ("errors.py", "from fedmira import config", "errors may only import nothing, not config"),
        (
            "graphs/graph.py",
            "def load():\n    from fedmira.model import base_model",
            "graphs may only import atomic, config, errors, seeds, not model",
        ),
        (
            "graphs/graph.py",
            "if TYPE_CHECKING:\n    from fedmira.data import Example",
            "graphs may only import atomic, config, errors, seeds, not data",
        ),
        ("report/tables.py", "import torch.nn", "report must work without torch"),
        (
            "clients/local.py",
            "import flwr",
            "flwr may only be imported in federation/flower/ or flower_app.py",
        ),
        (
            "clients/local.py",
            "from transformers.models import llama",
            "transformers may only be imported in model/",
        ),
        ("metrics/scores.py", "import peft as adapters", "peft may only be imported in model/"),
        (
            "data/sources/hub.py",
            "from ..encoding import encode",
            "relative import; write fedmira.<room> so that the direction can be seen",
        ),
        (
            "cli/main.py",
            "from fedmira.utils import anything",
            "utils is no room; add it to ALLOWED",
        ),
        (
            "model/lora/stack.py",
            "from fedmira.model.packed.probe import choose_path",
            "model.lora may only import model.base, not model.packed",
        ),
        (
            "model/base/layers.py",
            "from fedmira.model import load_base",
            "model.base may only import nothing, not model",
        ),
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
        ("federation/flower/nodes.py", "import flwr\nfrom fedmira.messages import Request"),
        ("flower_app.py", "from flwr.serverapp import ServerApp\nimport fedmira.federation"),
        (
            "methods/mira.py",
            "from fedmira.methods.base import Algorithm\nfrom fedmira.graphs import Graph",
        ),
        ("report/html.py", "import jinja2\nfrom fedmira.report.read import Run"),
        ("__init__.py", "from fedmira.experiment import build"),
    ],
)
def test_an_import_of_a_room_below_is_allowed(tmp_path: Path, place: str, code: str) -> None:
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code, encoding="utf-8")
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    "how",
    [
        "from fedmira.b import thing\n",
        "def later():\n    from fedmira.b import thing\n",
        "if TYPE_CHECKING:\n    from fedmira.b import thing\n",
    ],
    ids=["at the top", "in a function", "for type checking"],
)
def test_a_planted_circle_is_found_through_a_name_that_is_handed_on(
    tmp_path: Path, how: str
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "__init__.py").touch()
    (tmp_path / "a.py").write_text(how, encoding="utf-8")
    (tmp_path / "b/__init__.py").write_text("from fedmira.b.home import thing\n", encoding="utf-8")
    (tmp_path / "b/home.py").write_text("import fedmira.a\nthing = 1\n", encoding="utf-8")
    assert circle(edges(modules(tmp_path))) == ["fedmira.a", "fedmira.b.home", "fedmira.a"]
