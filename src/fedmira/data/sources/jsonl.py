"""Users' own JSON Lines: a folder or a file per client, or one file with a client column.

PATH/<client>/train.jsonl [test.jsonl] [validation.jsonl]
PATH/<client>.jsonl
PATH                         one .jsonl file whose rows name their client under `data.column`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedmira.config import DataSettings
from fedmira.data.examples import Example, RawTask, Reading
from fedmira.data.files import read_json_lines
from fedmira.data.problems import Problems
from fedmira.data.rows import Row, example_of, text_of
from fedmira.data.sources.grouping import group_key, sampled, tasks_by_key

__all__ = ["read"]

_PARTS = ("train.jsonl", "test.jsonl", "validation.jsonl")
_LONGEST_LOOK = 2**20
_TABLES = (".csv", ".tsv", ".parquet", ".json")
_USE_HUB = (
    "data.source = 'hub' reads one CSV, TSV, parquet or JSON file with the rows of all clients, of "
    "which data.column names the client"
)
_LAYOUTS = "PATH/<client>/train.jsonl, PATH/<client>.jsonl, or one .jsonl file with a client column"


def read(settings: DataSettings, seed: int) -> Reading:
    """Reads all clients under `settings.path`.

    Clients come sorted by name, those of one file in order of appearance.

    Raises:
        DataError: all problems of all files, together.
    """
    problems = Problems()
    place = Path(settings.path)
    tasks: list[RawTask] = []
    if settings.path and place.is_file():
        tasks = _one_file(place, settings, seed, problems)
    elif settings.path and place.is_dir():
        tasks = _one_folder(place, settings, seed, problems)
    else:
        problems.add(f"data.path {settings.path!r} does not exist; jsonl needs {_LAYOUTS}")
    problems.raise_if_any()
    return Reading(tuple(tasks))


def _one_file(path: Path, settings: DataSettings, seed: int, problems: Problems) -> list[RawTask]:
    if path.suffix.lower() in _TABLES and not _holds_lines(path):
        column = (
            ""
            if settings.column != "client"
            else ", and data.column to the column that names each row's client"
        )
        problems.add(
            f"{path}: source 'jsonl' reads JSON Lines (one object a line); set data.source "
            f"to 'hub' for this file{column}"
        )
        return []
    before = len(problems)
    rows = ((f"{path}:{number}", row) for number, row in read_json_lines(path, problems))
    tasks = tasks_by_key(rows, group_key(settings), settings, seed, problems)
    if not tasks and len(problems) == before:
        problems.add(f"{path}: holds no rows")
    return tasks


def _holds_lines(path: Path) -> bool:
    """Whether a file with another format's ending has an object on its first line all the same."""
    if path.suffix.lower() != ".json":
        return False
    with path.open("rb") as handle:
        first = handle.readline(_LONGEST_LOOK)
    return first.lstrip().startswith(b"{") and (
        len(first) == _LONGEST_LOOK or first.rstrip().endswith(b"}")
    )


def _one_folder(
    folder: Path, settings: DataSettings, seed: int, problems: Problems
) -> list[RawTask]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file() and entry.suffix == ".jsonl"]
    stray = [file.name for file in files if file.name in _PARTS]
    if stray:
        problems.add(
            f"{folder}: {', '.join(stray)} belong into a folder per client; looked for {_LAYOUTS}"
        )
        return []
    folders = [entry for entry in entries if entry.is_dir()]
    if not files and not folders:
        tables = _tables_in(folder)
        found = f", found {_some(tables)}; {_USE_HUB}" if tables else ""
        problems.add(f"{folder}: holds no clients; looked for {_LAYOUTS}{found}")
    of_tables = {
        entry.name: _tables_in(entry)
        for entry in folders
        if not any(entry.glob("*.jsonl")) and _tables_in(entry)
    }
    if of_tables:
        found = _some(sorted({name for names in of_tables.values() for name in names}))
        problems.add(
            f"{folder}: looked for <client>/train.jsonl, found {found} in "
            f"{_some(list(of_tables))}; write these files as JSON Lines (one "
            f"object a line), or as one table: {_USE_HUB}"
        )
        folders = [entry for entry in folders if entry.name not in of_tables]
    for file in files:
        if file.stem in {entry.name for entry in folders}:
            problems.add(
                f"{folder}: client {file.stem!r} stands there twice, as {file.name} and as "
                f"{file.stem}/; keep one"
            )
    tasks = [_client_of_file(file, settings, seed, problems) for file in files]
    tasks += [_client_of_folder(entry, settings, seed, problems) for entry in folders]
    return sorted(tasks, key=lambda task: task.name)


def _tables_in(folder: Path) -> list[str]:
    """Names of the files of other formats, sorted."""
    return sorted(
        path.name for path in folder.iterdir() if path.suffix.lower() in _TABLES and path.is_file()
    )


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _client_of_file(path: Path, settings: DataSettings, seed: int, problems: Problems) -> RawTask:
    examples, category = _read_rows(path, problems)
    return RawTask(path.stem, category, sampled(examples, path.stem, settings, seed))


def _client_of_folder(
    folder: Path, settings: DataSettings, seed: int, problems: Problems
) -> RawTask:
    present = [path.name for path in sorted(folder.glob("*.jsonl"))]
    for name in present:
        if name not in _PARTS:
            problems.add(
                f"{folder / name}: not a file of a client; a client's folder holds "
                f"{', '.join(_PARTS)}"
            )
    if "train.jsonl" not in present:
        found = (
            ", ".join(present) or _some(sorted(path.name for path in folder.iterdir())) or "nothing"
        )
        problems.add(f"{folder}: looked for train.jsonl, found {found}")
        return RawTask(folder.name, "", [])
    examples, category = _read_rows(folder / "train.jsonl", problems)
    test, validation = (
        _read_rows(folder / name, problems)[0] if name in present else None for name in _PARTS[1:]
    )
    return RawTask(
        folder.name, category, sampled(examples, folder.name, settings, seed), test, validation
    )


def _read_rows(path: Path, problems: Problems) -> tuple[list[Example], str]:
    """The examples of a file, and the category of its first row."""
    before = len(problems)
    examples: list[Example] = []
    category = ""
    for index, (where, row) in enumerate(_numbered(path, problems)):
        if index == 0:
            category = text_of(row, "category", where, problems, optional=True)
        example = example_of(row, where, problems)
        if example is not None:
            examples.append(example)
    if not examples and len(problems) == before:
        problems.add(f"{path}: holds no rows")
    return examples, category


def _numbered(path: Path, problems: Problems) -> Iterator[tuple[str, Row]]:
    for number, row in read_json_lines(path, problems):
        yield f"{path}:{number}", row
