"""Rows of a text whose cells are parted by a delimiter: CSV and TSV, whoever wrote it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmira.data.problems import Problems
from fedmira.data.texts import Row

__all__ = ["rows_of_text"]

_DELIMITERS = (",", ";", "\t", "|")
_NAMES = {";": "a semicolon", "\t": "a tab", "|": "a bar", ",": "a comma"}
_LOOK = 200
_LONGEST_CELL = 2**31 - 1
_NO_NAME = "unnamed:"


@dataclass(frozen=True, slots=True)
class _Record:
    """The cells of one row, and the lines it begins and ends at."""

    first: int
    last: int
    cells: list[str]


def rows_of_text(
    text: str, tabs: bool, path: Path, problems: Problems, notes: list[str]
) -> Iterator[tuple[str, Row]]:
    """The rows under the heading, with the line that each begins at; an empty cell is None.

    Args:
        text: of the whole file.
        tabs: whether the file says that tabs part its cells.
        path: for messages.
        problems: receives rows that do not fit the heading, and quotation marks that do not close.
        notes: receives what was found, where it is not the usual form.
    """
    skipped = 0
    if text[:4].lower() == "sep=" and len(text) > 4:  # what Excel puts in front
        delimiter, (_, _, text), skipped = text[4], text.partition("\n"), 1
    else:
        delimiter = "\t" if tabs else _delimiter(text)
    quoted = not tabs or _is_quoted(text, delimiter)
    if tabs and not quoted and '"' in text:
        notes.append(f"{path}: quotation marks are read as characters of the cells")
    if delimiter != ("\t" if tabs else ","):
        notes.append(f"{path}: {_NAMES.get(delimiter, repr(delimiter))} parts the cells")
    try:
        records = _records(text, delimiter, quoted)
    except csv.Error as error:
        problems.add(
            f"{path}: {error}; a quotation mark at the beginning of a cell must be closed at its "
            "end, and one inside be doubled"
        )
        return
    if not records:
        return
    heading = _heading(records[0], path, problems)
    for record in records[1:]:
        where = f"{path}:{record.first + skipped}"
        cells = record.cells
        if len(cells) > len(heading) and any(cells[len(heading) :]) or len(cells) < len(heading):
            problems.add(
                f"{where}: has {len(cells)} cells, the heading has {len(heading)}; put a cell that "
                "holds the delimiter in quotation marks"
            )
            continue
        if record.last > record.first and _swallows(record, delimiter, len(heading)):
            notes.append(f"{where}: a quoted cell holds lines that look like rows of their own")
        yield (
            where,
            {name: cell or None for name, cell in zip(heading, cells, strict=False) if name},
        )


def _records(text: str, delimiter: str, quoted: bool, most: int = 0) -> list[_Record]:
    """The records that are not blank lines.

    Raises:
        csv.Error: a quotation mark opens a cell that does not end with one.
    """
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        if quoted:
            lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        else:
            lines = csv.reader(
                io.StringIO(text, newline=""), delimiter=delimiter, quoting=csv.QUOTE_NONE
            )
        records: list[_Record] = []
        end = 0
        try:
            for cells in lines:
                if cells:
                    records.append(_Record(end + 1, lines.line_num, cells))
                end = lines.line_num
                if most and len(records) == most:
                    break
        except csv.Error as error:
            raise csv.Error(f"line {end + 1}: {error}") from error
        return records
    finally:
        csv.field_size_limit(before)


def _delimiter(text: str) -> str:
    """The delimiter under which most rows have as many cells as the heading, and more than one."""
    best, chosen = (0.0, 0), ","
    for delimiter in _DELIMITERS:
        try:
            records = _records(text, delimiter, quoted=True, most=_LOOK)
        except csv.Error:
            continue
        width = len(records[0].cells) if records else 0
        if width > 1:
            same = sum(len(record.cells) == width for record in records) / len(records)
            best, chosen = max((best, chosen), ((same, width), delimiter), key=lambda pair: pair[0])
    if best == (0.0, 0):  # no reading with quotation marks holds; the heading alone decides
        first = text.split("\n", 1)[0]
        counts = [first.count(delimiter) for delimiter in _DELIMITERS]
        chosen = _DELIMITERS[counts.index(max(counts))]
    return chosen


def _is_quoted(text: str, delimiter: str) -> bool:
    """Whether quotation marks are there as a writer of tables puts them: where needed, or always.

    Elsewhere, in files with tabs, they are characters.
    """
    if '"' not in text:
        return True
    try:
        cells = [record.cells for record in _records(text, delimiter, quoted=True)]
    except csv.Error:
        return False
    if len({len(row) for row in cells}) > 1:
        return False
    plain = _lines(text)
    return any(
        _lines(_written(cells, delimiter, quoting)) == plain
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    )


def _written(cells: Sequence[Sequence[str]], delimiter: str, quoting: int) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator="\n").writerows(cells)  # type: ignore[arg-type]
    return out.getvalue()


def _lines(text: str) -> list[str]:
    return [line for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line]


def _heading(record: _Record, path: Path, problems: Problems) -> list[str]:
    """The names of the columns; "" for one that has none, such as the index that pandas writes."""
    names = [name.strip().lstrip("\ufeff") for name in record.cells]
    names = ["" if name.lower().startswith(_NO_NAME) else name for name in names]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        problems.add(f"{path}: the columns {', '.join(twice)} stand twice; rename one of each")
    return names


def _swallows(record: _Record, delimiter: str, width: int) -> bool:
    return any(
        line.count(delimiter) == width - 1
        for cell in record.cells
        for line in cell.split("\n")[1:]
        if width > 1
    )
