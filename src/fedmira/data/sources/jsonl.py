"""Users' own rows: a folder or a file per client, or one table with a client column.

PATH/<client>/train.*  [test.*]  [validation.*]
PATH/<client>.*
PATH/train.*  [test.*]  [validation.*]     whose rows name their client under `data.column`
PATH                                       one file of that kind

The files are JSON Lines, JSON lists, CSV, TSV or parquet, each perhaps packed by gzip, in any
mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedmira.config import DataSettings
from fedmira.data.examples import Example, RawTask, Reading
from fedmira.data.problems import Problems
from fedmira.data.rows import RowReader, text_of
from fedmira.data.sources.grouping import group_key, sampled, tables_by_key
from fedmira.data.sources.layouts import PARTS, parts_of, rows_of, sorted_out
from fedmira.data.tables import ENDINGS, stem_of

__all__ = ["read", "read_own"]

_LAYOUTS = "PATH/<client>/train.jsonl, PATH/<client>.jsonl, or one .jsonl file with a client column"
_KINDS = f"{', '.join(ENDINGS)} files, also with .gz, are read"


def read(settings: DataSettings, seed: int) -> Reading:
    """Reads all clients under `settings.path`.

    Clients come sorted by name, those of one file in order of appearance.

    Args:
        settings: the [data] section.
        seed: the seed of the run.

    Raises:
        DataError: all problems of all files, together.
    """
    problems = Problems()
    place = Path(settings.path)
    reader = _Clients(settings, seed, problems)
    tasks: list[RawTask] = []
    if settings.path and place.is_file():
        tasks = reader.of_tables({"train": [place]})
    elif settings.path and place.is_dir():
        tasks = reader.of_folder(place)
    else:
        problems.add(f"data.path {settings.path!r} does not exist; jsonl needs {_LAYOUTS}")
    skipped, notes = reader.rows.finish()
    problems.raise_if_any()
    return Reading(tuple(tasks), (*reader.skipped, *skipped), (*reader.notes, *notes))


def read_own(settings: DataSettings, seed: int, name: str) -> Reading:
    """Reads the rows of one client, which need not say whose they are.

    Besides what `read` reads, `settings.path` may be a file of the client's rows, or its folder
    with train.* and perhaps test.* and validation.*. Where the rows name clients in
    `data.column`, each becomes a task, as with `read`.

    Args:
        settings: the [data] section.
        seed: the seed of the run.
        name: what the client is called where no row says it.

    Raises:
        DataError: all problems of all files, together.
    """
    place = Path(settings.path)
    if place.is_file():
        parts = {"train": [place]}
    else:
        parts = parts_of(sorted_out(place, [])[0]) if place.is_dir() else {}
    if "train" not in parts or "" in parts:
        return read(settings, seed)
    key = settings.column
    if any(key in row for _, row in rows_of(parts["train"], Problems(), [])):
        return read(settings, seed)
    problems = Problems()
    reader = _Clients(settings, seed, problems)
    task = reader.of_parts(name, parts)
    skipped, notes = reader.rows.finish()
    problems.raise_if_any()
    return Reading((task,), (*reader.skipped, *skipped), (*reader.notes, *notes))


class _Clients:
    """Reads the files of clients, and keeps what is to be said of them."""

    def __init__(self, settings: DataSettings, seed: int, problems: Problems) -> None:
        self.settings, self.seed, self.problems = settings, seed, problems
        self.rows = RowReader(settings, problems)
        self.skipped: list[str] = []
        self.notes: list[str] = []

    def of_tables(self, parts: dict[str, list[Path]]) -> list[RawTask]:
        """The clients that one table names."""
        tables = {part: rows_of(files, self.problems, self.notes) for part, files in parts.items()}
        tasks, left = tables_by_key(
            tables, group_key(self.settings), self.settings, self.seed, self.problems, self.rows
        )
        self.skipped += left
        return tasks

    def of_folder(self, folder: Path) -> list[RawTask]:
        """The clients of a folder."""
        files, folders = sorted_out(folder, self.skipped)
        parts = parts_of(files)
        if "train" in parts and "" not in parts and not folders:
            return self._of_parts(folder, parts)
        stray = [file.name for file in files if stem_of(file).lower() in PARTS]
        if stray:
            self.problems.add(
                f"{folder}: {', '.join(stray)} belong into a folder per client; looked for "
                f"{_LAYOUTS}"
            )
            return []
        if not files and not folders:
            found = f", found {_some([entry.split(': ')[0] for entry in self.skipped])}"
            self.problems.add(
                f"{folder}: holds no clients; looked for {_LAYOUTS}"
                f"{found if self.skipped else ''}; {_KINDS}"
            )
        names: dict[str, str] = {entry.name: f"{entry.name}/" for entry in folders}
        for file in files:
            name = stem_of(file)
            if name in names:
                self.problems.add(
                    f"{folder}: client {name!r} stands there twice, as {file.name} and as "
                    f"{names[name]}; keep one"
                )
            names.setdefault(name, file.name)
        tasks = [self._task(stem_of(file), [file]) for file in files]
        tasks += [self._of_client(entry) for entry in folders]
        return sorted(tasks, key=lambda task: task.name)

    def _of_parts(self, folder: Path, parts: dict[str, list[Path]]) -> list[RawTask]:
        """The clients of a folder with a table for each part, or what else it may have been."""
        before = len(self.problems)
        tasks = self.of_tables(parts)
        if not any(task.name for task in tasks) and len(self.problems) > before:
            self.problems.add(
                f"{folder}: read as one table of all clients; where these rows are those of one "
                f"client, data.path is the folder above it: {_LAYOUTS}"
            )
        return tasks

    def _of_client(self, folder: Path) -> RawTask:
        others: list[str] = []
        files, folders = sorted_out(folder, others)
        parts = parts_of(files)
        for file in parts.get("", []):
            self.problems.add(
                f"{file}: not a file of a client; a client's folder holds "
                f"{', '.join(f'{part}.jsonl' for part in PARTS)} or files of other endings"
            )
        if "train" not in parts:
            names = sorted(entry.name for entry in folder.iterdir())
            self.problems.add(
                f"{folder}: looked for train.jsonl, found {_some(names) or 'nothing'}"
            )
            return RawTask(folder.name, "", [])
        self.skipped += [*others, *(f"{entry}: a folder inside of a client's" for entry in folders)]
        return self.of_parts(folder.name, parts)

    def of_parts(self, name: str, parts: dict[str, list[Path]]) -> RawTask:
        """A client of the files of each part."""
        return self._task(name, *(parts.get(part) for part in PARTS))

    def _task(
        self,
        name: str,
        train: Sequence[Path] | None,
        test: Sequence[Path] | None = None,
        validation: Sequence[Path] | None = None,
    ) -> RawTask:
        examples, category = self._examples(train or [])
        return RawTask(
            name,
            category,
            sampled(examples, name, self.settings, self.seed),
            self._examples(test)[0] if test is not None else None,
            self._examples(validation)[0] if validation is not None else None,
        )

    def _examples(self, files: Sequence[Path]) -> tuple[list[Example], str]:
        """The examples of files, and the category of the first row."""
        examples: list[Example] = []
        category = ""
        key = self.settings.columns.category or "category"
        for index, (where, row) in enumerate(rows_of(files, self.problems, self.notes)):
            if index == 0:
                category = text_of(row, key, where, self.problems, optional=True)
            example = self.rows.example(row, where)
            if example is not None:
                examples.append(example)
        return examples, category


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
