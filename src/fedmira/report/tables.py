"""Tables of the page: their columns, how numbers are written, and what a cell sorts by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedmira.metrics import LOSS_METRICS, TEXT_METRICS, Metric
from fedmira.report.charts import nice_number, percent_text
from fedmira.report.findings import MIB, Change
from fedmira.report.records import Client, Round

__all__ = [
    "MISSING",
    "MOST_ROWS",
    "Cell",
    "Column",
    "client_table",
    "loss_text",
    "number_cell",
    "number_text",
    "round_table",
    "setting_text",
    "text_cell",
    "worst_clients",
]

MISSING = "–"
MOST_ROWS = 500  # of a table; the files hold the rest


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell: its text, how it sorts and how it is set.

    "" sorts last. It may be set as a number, and with a CSS class.

    Attributes:
        text: what is shown.
        key: what the cell sorts by.
        number: whether it is set as a number.
        style: a CSS class.
    """

    text: str
    key: str
    number: bool = True
    style: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A table column: its heading, and whether it holds numbers.

    Attributes:
        title: the heading.
        number: whether its cells are numbers.
    """

    title: str
    number: bool = True


def loss_text(value: float | None) -> str:
    """A loss with three decimals."""
    return MISSING if value is None else f"{value:.3f}"


def number_text(value: float | None) -> str:
    """A count with thousands separated, or a number in four significant digits."""
    return (
        MISSING
        if value is None
        else f"{value:,.0f}"
        if float(value).is_integer() or abs(value) >= 1000
        else nice_number(value)
    )


def setting_text(value: object) -> str:
    """A setting as it is written in TOML, near enough to read."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(setting_text(item) for item in value) + "]"
    return MISSING if value is None else '""' if value == "" else str(value)


def worst_clients(clients: Sequence[Client], most: int) -> dict[int, Client]:
    """At most so many clients, those with the highest loss at the end.

    They come by their number from 1 and in their order.

    Args:
        clients: in the order of the table.
        most: how many at most.
    """
    numbered = dict(enumerate(clients, start=1))
    if len(numbered) <= most:
        return numbered
    # Without a finite loss it has diverged, which is the worst.
    given = {number: client.after_align_loss for number, client in numbered.items()}
    losses = {number: math.inf if loss is None else loss for number, loss in given.items()}
    worst_first = sorted(numbered, key=lambda number: -losses[number])
    return {number: numbered[number] for number in sorted(worst_first[:most])}


_ClientColumn = tuple[str, Callable[[Client], float | None], Callable[[float | None], str]]
"""A heading, the column's number of a client, and how it is written."""


def client_table(
    numbered: Mapping[int, Client], changes: Mapping[str, Change]
) -> tuple[list[Column], list[list[Cell]], list[tuple[str, str]]]:
    """The table of clients.

    Args:
        numbered: its rows, by the client's number on the page.
        changes: by client, for the column of changes.

    Returns:
        The columns of which a client has a value; the rows; in place of a column, what is alike for
        all clients as (title, value).
    """
    numbers: list[_ClientColumn] = [
        ("rank", lambda row: row.rank, number_text),
        ("train rows", lambda row: row.train_rows, number_text),
        ("test rows", lambda row: row.test_rows, number_text),
        ("rounds", lambda row: row.rounds_trained, number_text),
        *map(_metric_column, LOSS_METRICS.values()),
        (
            "change",
            lambda row: changes[row.client].relative if row.client in changes else None,
            _change_text,
        ),
        ("best round", lambda row: row.best_round, number_text),
        ("loss at best round", lambda row: row.best_test_loss, loss_text),
        *map(_metric_column, TEXT_METRICS.values()),
    ]
    clients = list(numbered.values())
    columns = [Column("#"), Column("client", number=False)]
    cells = [[number_cell(number), text_cell(row.client)] for number, row in numbered.items()]
    alike = []
    for title, value_of, shown in numbers:
        values = [value_of(row) for row in clients]
        if (
            len(values) > 1
            and len(set(values)) == 1
            and values[0] is not None
            and shown is number_text
        ):
            alike.append((title, shown(values[0])))
        elif any(value is not None for value in values):
            columns.append(Column(title))
            for line, row, value in zip(cells, clients, values, strict=True):
                line.append(
                    number_cell(
                        value,
                        shown,
                        changes[row.client].verdict
                        if title == "change" and row.client in changes
                        else "",
                    )
                )
    _add_texts("category", [row.category for row in clients], columns, cells)
    _add_texts(
        "task", ["" if row.task == row.client else row.task for row in clients], columns, cells
    )
    return columns, cells, alike


def _metric_column(metric: Metric) -> _ClientColumn:
    """A metric's column of the table of clients."""
    return metric.heading, lambda row: row.figure(metric.name), loss_text


def _add_texts(
    title: str, texts: Sequence[str], columns: list[Column], cells: list[list[Cell]]
) -> None:
    """Appends a column of texts unless all are empty."""
    if any(texts):
        columns.append(Column(title, number=False))
        for line, text in zip(cells, texts, strict=True):
            line.append(text_cell(text))


def number_cell(
    value: float | None, shown: Callable[[float | None], str] = number_text, style: str = ""
) -> Cell:
    """A cell that sorts by its value, after all others where it has none.

    Args:
        value: what the cell sorts by.
        shown: how the value is written.
        style: a CSS class.
    """
    return Cell(shown(value), "" if value is None else repr(float(value)), True, style)


def text_cell(text: str) -> Cell:
    """A cell that sorts by its text."""
    return Cell(text, text, False)


def _change_text(value: float | None) -> str:
    return MISSING if value is None else percent_text(value, 1)


def round_table(rounds: Sequence[Round]) -> tuple[list[Column], list[list[Cell]]]:
    """metrics/rounds.csv with bytes as MiB, without columns that no round has."""
    shown = {
        name: loss_text
        for name in ("train_loss", "train_loss_weighted", "test_loss", "test_loss_weighted")
    }
    columns: list[Column] = []
    cells: list[list[Cell]] = [[] for _ in rounds]
    for name in Round.__dataclass_fields__:
        values = [getattr(row, name) for row in rounds]
        if not any(value is not None for value in values):
            continue
        in_mib = name.startswith("bytes_")
        columns.append(Column(name.replace("bytes_", "MiB ").replace("_", " ")))
        for line, value in zip(cells, values, strict=True):
            line.append(
                number_cell(
                    value / MIB if in_mib and value is not None else value,
                    shown.get(name, number_text),
                )
            )
    return columns, cells
