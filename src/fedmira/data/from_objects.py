"""Rows that are objects of Python: lists of dicts, data sets of Hugging Face, DataFrames."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedmira.config import DataSettings
from fedmira.config.sources import OBJECT
from fedmira.data.advantages import ADVANTAGE
from fedmira.data.examples import Example, RawTask, Reading
from fedmira.data.problems import Problems
from fedmira.data.rows import Row, RowReader, text_of
from fedmira.data.sources.grouping import sampled

__all__ = ["OBJECT", "ObjectRows", "rows_from_objects"]

_PARTS = ("train", "test", "validation")
_KNOWN = (
    "a list of dicts, a datasets.Dataset, a DataFrame, or a dict of such parts by 'train', 'test' "
    "and 'validation'"
)


@dataclass(frozen=True, slots=True)
class ObjectRows:
    """The rows of all clients, as they were given.

    Attributes:
        parts: client id -> part ("train", and perhaps "test" and "validation") -> its rows.
        sha256: of all ids, parts and rows, so that a run can be held against them later.
    """

    parts: Mapping[str, Mapping[str, tuple[Row, ...]]]
    sha256: str

    def reading(self, settings: DataSettings, seed: int) -> Reading:
        """A task for each client, in the order of their ids.

        Args:
            settings: how many of the rows are used.
            seed: of the run.

        Raises:
            DataError: with all rows that are of no known shape.
        """
        problems = Problems()
        reader = RowReader(settings, problems)
        tasks = []
        for client, parts in sorted(self.parts.items()):
            read = {part: _examples(client, part, rows, reader) for part, rows in parts.items()}
            first = parts["train"][0] if parts["train"] else {}
            category = text_of(first, "category", f"{client} row 1", problems, optional=True)
            train = sampled(read["train"], client, settings, seed)
            tasks.append(RawTask(client, category, train, read.get("test"), read.get("validation")))
        skipped, notes = reader.finish()
        problems.raise_if_any()
        return Reading(tuple(tasks), tuple(skipped), tuple(notes))


def rows_from_objects(clients: Mapping[str, Any]) -> ObjectRows:
    """Takes the rows of clients from objects.

    Cells that are missing in a DataFrame (NaN, NaT, None) are missing in its rows. numpy's numbers
    become Python's.

    Args:
        clients: client id -> its rows: a list of dicts, a `datasets.Dataset`, a DataFrame, or a
            dict of such parts by "train", "test" and "validation".

    Raises:
        DataError: with everything that holds no rows.
    """
    problems = Problems()
    parts: dict[str, dict[str, tuple[Row, ...]]] = {}
    if not clients:
        problems.add("clients: there are none; give a dict from client id to rows")
    for client, given in clients.items():
        if not isinstance(client, str):
            problems.add(f"clients: the id {client!r} is no text; ids name folders")
            continue
        named = dict(given) if isinstance(given, Mapping) else {"train": given}
        unknown = [repr(part) for part in named if part not in _PARTS]
        if unknown or "train" not in named:
            problems.add(
                f"clients[{client!r}]: has the parts "
                f"{', '.join(map(str, named)) or 'none'}; give {_KNOWN}"
            )
            continue
        parts[client] = {
            part: tuple(_rows(f"clients[{client!r}]", rows, problems))
            for part, rows in named.items()
        }
        if not parts[client]["train"]:
            problems.add(f"clients[{client!r}]: holds no rows to train on")
    problems.raise_if_any()
    return ObjectRows(parts, _hash(parts))


def _rows(where: str, given: Any, problems: Problems) -> Iterator[Row]:
    """The rows of one object as plain dicts, without missing cells."""
    rows: Any = given
    if hasattr(given, "to_dict") and hasattr(given, "columns"):  # a DataFrame
        rows = given.to_dict("records")
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        problems.add(f"{where}: rows of type {type(given).__name__}; give {_KNOWN}")
        return
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            problems.add(f"{where} row {number}: is of type {type(row).__name__}; must be a dict")
            return
        yield {
            str(key): value
            for key, cell in row.items()
            # A critic that failed says NaN: that is no cell that nobody filled.
            if not _missing(value := _plain(cell)) or (key == ADVANTAGE and value is not None)
        }


def _plain(value: Any) -> Any:
    """A value with numpy's numbers, arrays and tuples as Python's."""
    if hasattr(value, "tolist") and not isinstance(value, str | bytes):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _missing(value: Any) -> bool:
    """Whether a cell is empty: None, and whatever does not equal itself, as NaN and NaT do not."""
    return value is None or (not isinstance(value, list | dict) and bool(value != value))


def _examples(client: str, part: str, rows: tuple[Row, ...], reader: RowReader) -> list[Example]:
    of = client if part == "train" else f"{client} {part}"
    found = (reader.example(row, f"{of} row {number}") for number, row in enumerate(rows, start=1))
    return [example for example in found if example is not None]


def _hash(parts: Mapping[str, Mapping[str, tuple[Row, ...]]]) -> str:
    hasher = hashlib.sha256()
    for client, of in sorted(parts.items()):
        for part, rows in sorted(of.items()):
            hasher.update(repr((client, part, len(rows))).encode())
            for row in rows:
                hasher.update(json.dumps(row, sort_keys=True, default=str).encode())
    return hasher.hexdigest()
