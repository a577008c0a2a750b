"""Files and folders with the rows of clients: which belong to whom, and which are not read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fedmira.data.problems import Problems
from fedmira.data.tables import ending_of, read_table, stem_of
from fedmira.data.texts import Row

__all__ = ["PARTS", "part_of", "parts_of", "rows_of", "sorted_out"]

PARTS = ("train", "test", "validation")
_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


def part_of(path: Path) -> str:
    """Which part a file holds by its name, such as test.csv; "" where the name says none."""
    words = [word for word in re.split(r"[-_. 0-9]+", stem_of(path).lower()) if word]
    rest = [word for word in words if word not in _WORDS and word != "of"]
    found = {_WORDS[word] for word in words if word in _WORDS}
    return found.pop() if len(found) == 1 and not rest else ""


def sorted_out(folder: Path, skipped: list[str]) -> tuple[list[Path], list[Path]]:
    """The files with rows and the folders in a folder; all other files are named as left out.

    Args:
        folder: a folder.
        skipped: a line is added for each file that is left out.
    """
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file()]
    tables = [file for file in files if ending_of(file)]
    skipped += [f"{file}: holds no rows by its ending" for file in files if not ending_of(file)]
    return tables, [entry for entry in entries if entry.is_dir()]


def parts_of(files: Iterable[Path], default: str = "") -> dict[str, list[Path]]:
    """Part -> its files.

    Args:
        files: in their order.
        default: the part of a file whose name says none.
    """
    parts: dict[str, list[Path]] = {}
    for file in files:
        parts.setdefault(part_of(file) or default, []).append(file)
    return parts


def rows_of(
    files: Sequence[Path], problems: Problems, notes: list[str]
) -> Iterator[tuple[str, Row]]:
    """The rows of several files, one file after the other; a file without rows is a problem.

    Args:
        files: the files, in order.
        problems: collects what is wrong, with its place.
        notes: a line is added for what is to be said before training.
    """
    for file in files:
        before = len(problems)
        number = 0
        for number, item in enumerate(read_table(file, problems, notes), start=1):  # noqa: B007
            yield item
        if not number and len(problems) == before:
            problems.add(f"{file}: holds no rows")
