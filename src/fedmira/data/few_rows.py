"""A few rows of one client or of one file, as texts and as tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedmira.config import DataSettings
from fedmira.data.encoded import EncodedExample
from fedmira.data.encoding import Encoder
from fedmira.data.examples import Example
from fedmira.data.from_objects import ObjectRows
from fedmira.data.problems import Problems
from fedmira.data.reading import read_all, split_all
from fedmira.data.rows import Row, RowReader
from fedmira.data.tables import read_table
from fedmira.errors import DataError

__all__ = ["encode_few", "rows_of_clients", "rows_of_file", "rows_of_objects"]

_log = logging.getLogger("fedmira")


def rows_of_clients(
    settings: DataSettings, seed: int, most: int, rows: ObjectRows | None = None
) -> dict[str, tuple[Example, ...]]:
    """Rows of every client: of those it is tested on, else of those it chooses by or trains on.

    Args:
        settings: the [data] section of the run.
        seed: of the run.
        most: so many of each at most.
        rows: of a run whose rows are objects.

    Raises:
        DataError: the rows cannot be read.
    """
    clients, _, _ = read_all(settings, seed, rows)
    return {
        client.client_id: (*split.test, *split.validation, *split.train)[:most]
        for client, split in zip(clients, split_all(clients, settings, seed), strict=True)
    }


def rows_of_file(path: Path, settings: DataSettings) -> tuple[Example, ...]:
    """The rows of a file, by the columns of a run.

    Args:
        path: JSON Lines, a JSON list, CSV, TSV or parquet.
        settings: the [data] section of the run.

    Raises:
        DataError: with all rows that are wrong, or there is none.
    """
    problems, notes = Problems(), list[str]()
    found = _read(read_table(path, problems, notes), settings, problems)
    for note in notes:
        _log.warning("%s", note)
    if not found:
        raise DataError(f"{path}: holds no row; give at least one with an answer")
    return found


def rows_of_objects(rows: Sequence[Row], settings: DataSettings) -> tuple[Example, ...]:
    """Rows that are dicts, by the columns of a run.

    Args:
        rows: as runs are given them.
        settings: the [data] section of the run.

    Raises:
        DataError: with all rows that are wrong.
    """
    placed = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    return _read(placed, settings, Problems())


def _read(
    rows: Iterable[tuple[str, Row]], settings: DataSettings, problems: Problems
) -> tuple[Example, ...]:
    reader = RowReader(settings.model_copy(update={"bad_rows": "error"}), problems)
    read = [reader.example(row, where) for where, row in rows]
    skipped, said = reader.finish()
    problems.raise_if_any()
    for note in (*skipped, *said):
        _log.warning("%s", note)
    return tuple(example for example in read if example is not None)


def encode_few(encoder: Encoder, rows: Sequence[Example]) -> tuple[EncodedExample, ...]:
    """Rows as tokens, cut as those of training are.

    Args:
        encoder: of the run's settings.
        rows: with their responses.

    Raises:
        DataError: with all rows that cannot be encoded.
    """
    problems = Problems()
    found, _, _ = encoder.encode(rows, problems)
    problems.raise_if_any()
    return found
