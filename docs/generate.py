"""Write what the pages say of the code: python docs/generate.py [--check]

The file tree in ARCHITECTURE.md is made of the first sentences of the modules, and the tables in
docs/configuration.md of the fields of the settings. With `--check` nothing is written, and the exit
code is 1 where a page is not up to date.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # where this file is loaded and not run

from configuration_tables import tables  # noqa: E402

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fedmira"
BEGIN, END = "<!-- made by docs/generate.py: {} -->", "<!-- end of {} -->"

__all__ = ["file_tree", "out_of_date", "pages"]


def file_tree() -> str:
    """Each room and module with the first sentence of its docstring, as a text block."""
    lines = [
        _line(SOURCE / f"{name}.py") for name in sorted(path.stem for path in SOURCE.glob("*.py"))
    ]
    for folder in sorted(path.parent for path in SOURCE.rglob("__init__.py")):
        if folder != SOURCE:
            lines += [
                "",
                f"{folder.relative_to(SOURCE).as_posix()}/  {_sentence(folder / '__init__.py')}",
            ]
            lines += [
                _line(path) for path in sorted(folder.glob("*.py")) if path.stem != "__init__"
            ]
    return "\n".join(["```", "src/fedmira/", *lines, "```"])


def pages() -> dict[Path, str]:
    """Page -> its text as it should be."""
    architecture = ROOT / "ARCHITECTURE.md"
    configuration = ROOT / "docs" / "configuration.md"
    settings = configuration.read_text(encoding="utf-8")
    for section, table in tables().items():
        settings = _with(settings, f"settings of {section}", table)
    return {
        architecture: _with(architecture.read_text(encoding="utf-8"), "files", file_tree()),
        configuration: settings,
    }


def out_of_date() -> list[str]:
    """Names of the pages that must be written anew."""
    return [page.name for page, text in pages().items() if page.read_text(encoding="utf-8") != text]


def _line(path: Path) -> str:
    return f"  {path.name:<22} {_sentence(path)}"


def _sentence(path: Path) -> str:
    """The first line of a module's docstring, without the full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0].removesuffix(".")


def _with(page: str, name: str, block: str) -> str:
    """The page with a block between its marks.

    Raises:
        ValueError: the marks are missing.
    """
    begin, end = BEGIN.format(name), END.format(name)
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"the page lacks the marks {begin!r} and {end!r}")
    return f"{before}{begin}\n{block}\n{end}{after}"


if __name__ == "__main__":
    if "--check" in sys.argv:
        stale = out_of_date()
        sys.exit(f"run python docs/generate.py: {', '.join(stale)} out of date" if stale else 0)
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
