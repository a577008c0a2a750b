"""Every module says in `__all__` what it offers, and all of that exists and is documented.

Nothing grows beyond its budget.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "fedmira"
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "__main__.py"]
PLACES = [path.relative_to(SOURCE).as_posix() for path in FILES]

MODULE_LINES = 500
FUNCTION_LINES = 60
SAYS_NOTHING = {"utils", "util", "common", "core", "helpers", "misc"}
OPTIONAL = {"flwr", "tensorboard"}

by_file = pytest.mark.parametrize("path", FILES, ids=PLACES)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def dotted(path: Path) -> str:
    return ".".join(["fedmira", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(
        ".__init__"
    )


def offered(tree: ast.Module) -> list[str] | None:
    """The value of `__all__`, or None where it is missing."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            return list(ast.literal_eval(node.value))
    return None


def definitions(tree: ast.Module) -> list[Definition]:
    """Public functions and classes that are defined at the top of a module."""
    return [
        node for node in tree.body if isinstance(node, Definition) and not node.name.startswith("_")
    ]


def optional_libraries(path: Path, tree: ast.Module) -> set[str]:
    """Those that a module needs to be imported.

    Of federation/flower, all need Flower, if only by each other.
    """
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found = {name.partition(".")[0] for name in names} | (
        {"flwr"} if "federation/flower" in path.as_posix() else set()
    )
    return found & OPTIONAL


@by_file
def test_module_is_documented_and_offers_names(path: Path) -> None:
    tree = parse(path)
    assert ast.get_docstring(tree), (
        "the module needs a docstring: one sentence that says what it is"
    )
    if path.name == "__init__.py" and len(tree.body) == 1:
        return  # a room whose modules are named one by one
    names = offered(tree)
    assert names is not None, "the module needs __all__"
    assert len(names) == len(set(names)), "__all__ names something twice"


@by_file
def test_offered_names_exist(path: Path) -> None:
    tree = parse(path)
    for library in optional_libraries(path, tree):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}, which is optional and not installed")
    module = importlib.import_module(dotted(path))
    assert [name for name in offered(tree) or [] if not hasattr(module, name)] == []


@by_file
def test_public_definitions_are_offered_and_documented(path: Path) -> None:
    tree = parse(path)
    names = offered(tree) or []
    assert [node.name for node in definitions(tree) if node.name not in names] == [], (
        "add these to __all__, or begin them with _"
    )
    assert [node.name for node in definitions(tree) if not ast.get_docstring(node)] == [], (
        "these need a docstring"
    )


@by_file
def test_module_and_its_functions_stay_within_their_budget(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MODULE_LINES
    functions = [
        node
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    too_long = {
        node.name: length for node in functions if (length := lines_of(node)) > FUNCTION_LINES
    }
    assert too_long == {}, f"more than {FUNCTION_LINES} lines"


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of its code, without its signature and its docstring."""
    first = function.body[1:] if ast.get_docstring(function) else function.body
    return (function.end_lineno or 0) - first[0].lineno + 1 if first else 0


def test_package_names_say_what_is_inside() -> None:
    assert [place for place in PLACES if SAYS_NOTHING & set(place.split("/")[:-1])] == []


@pytest.mark.parametrize("package", ["config", "report"])
def test_light_packages_start_without_torch(package: str) -> None:
    if not (SOURCE / package).is_dir():
        pytest.skip(f"there is no package {package}")
    code = f"import sys, fedmira.{package}; sys.exit('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr or f"fedmira.{package} imports torch"
