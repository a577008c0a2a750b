"""The docstring of what a room offers names every argument and every field.

Arguments stand under `Args:`, fields of a dataclass under `Attributes:`. Three things are left out:
a single argument, whose meaning the first sentence gives; a method or field that is documented by a
base class of the package, or by a protocol that the class fulfils; and names that begin with _.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "fedmira"

ROOMS = (
    "adapters",
    "api",
    "atomic.py",
    "clients",
    "config",
    "data",
    "experiment",
    "federation",
    "fleet",
    "graphs",
    "messages.py",
    "methods",
    "metrics",
    "model",
    "observers",
    "report",
    "rounds",
    "runs",
    "seeds.py",
    "storage",
    "studies",
    "wire",
)
"""Of the command line, the help of each option says what it is."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def offered(tree: ast.Module) -> list[Function | ast.ClassDef]:
    """Functions and classes that the module offers."""
    return [
        node
        for node in tree.body
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
    ]


CLASSES = {
    node.name: node
    for path in sorted(SOURCE.rglob("*.py"))
    for node in offered(parse(path))
    if isinstance(node, ast.ClassDef)
}


def methods(node: ast.ClassDef) -> dict[str, Function]:
    """The public methods of a class, with the one that makes it."""
    return {
        each.name: each
        for each in node.body
        if isinstance(each, Function) and (each.name == "__init__" or each.name[0] != "_")
    }


def parents(node: ast.ClassDef) -> list[ast.ClassDef]:
    """Base classes of the package, near and far, and protocols that the class fulfils."""
    names = {base.id for base in node.bases if isinstance(base, ast.Name)}
    near = [CLASSES[name] for name in sorted(names) if name in CLASSES]
    far = [parent for each in near for parent in parents(each)]
    fulfilled = [
        each
        for each in CLASSES.values()
        if each is not node
        and any(isinstance(base, ast.Name) and base.id == "Protocol" for base in each.bases)
        and {name for name, method in methods(each).items() if not method.decorator_list}
        <= methods(node).keys()
    ]
    return [*near, *far, *fulfilled]


def arguments(function: Function) -> list[str]:
    given = function.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    names = [each.arg for each in every if each is not None]
    return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]


def fields(node: ast.ClassDef) -> list[str]:
    """The fields of a dataclass; none of another class."""
    if not any("dataclass" in ast.unparse(each) for each in node.decorator_list):
        return []
    return [
        each.target.id
        for each in node.body
        if isinstance(each, ast.AnnAssign)
        and isinstance(each.target, ast.Name)
        and not each.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(each.annotation)
    ]


def described(docstring: str) -> set[str]:
    """The names that stand under `Args:` and `Attributes:`."""
    found: set[str] = set()
    for section in re.findall(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)*)", docstring, re.M):
        for names in re.findall(r"^    ([\w, *]+):", section, re.M):
            found |= {name.strip(" *") for name in names.split(",")}
    return found


def missing(names: list[str], *docstrings: str | None) -> list[str]:
    known: set[str] = set().union(*(described(text or "") for text in docstrings))
    return [name for name in names if name not in known] if len(names) > 1 else []


def undescribed(tree: ast.Module) -> dict[str, list[str]]:
    """Public name -> its arguments or fields that no docstring names."""
    found: dict[str, list[str]] = {}
    for node in offered(tree):
        text = ast.get_docstring(node)
        if not isinstance(node, ast.ClassDef):
            found[node.name] = missing(arguments(node), text)
            continue
        above = {name for parent in parents(node) for name in fields(parent)}
        found[node.name] = missing([name for name in fields(node) if name not in above], text)
        inherited = {name for parent in parents(node) for name in methods(parent)}
        for name, method in methods(node).items():
            if name not in inherited or name == "__init__":
                own = ast.get_docstring(method)
                about_class = text if name == "__init__" else None
                found[f"{node.name}.{name}"] = missing(arguments(method), own, about_class)
    return {name: names for name, names in found.items() if names}


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_name_every_argument(room: str) -> None:
    place = SOURCE / room
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    found = {
        f"{path.relative_to(SOURCE).as_posix()} {name}": names
        for path in files
        for name, names in undescribed(parse(path)).items()
    }
    assert found == {}


def test_an_argument_without_a_line_is_found() -> None:
    code = (
        "def move(start, way, *, speed=1):\n"
        '    """Moves.\n\n    Args:\n        start, speed: numbers.\n    """\n'
    )
    assert undescribed(ast.parse(code)) == {"move": ["way"]}
