"""Who joined a run once it had begun: the table of the page, and over whom its means are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from fedmira.report.records import Client, Event, Run
from fedmira.report.tables import Cell, Column, loss_text, number_cell, text_cell

__all__ = ["Newcomers", "newcomers_of"]


@dataclass(frozen=True, slots=True)
class Newcomers:
    """Those who joined a run.

    Attributes:
        columns: of the table.
        cells: its rows, in the order in which clients came.
        means: over how many clients means over clients are, round by round.
    """

    columns: Sequence[Column]
    cells: Sequence[Sequence[Cell]]
    means: str


def newcomers_of(run: Run) -> Newcomers | None:
    """Who joined, with the losses on test rows before the first own step and at the end.

    Args:
        run: that is read; None where nobody joined it.
    """
    joins = run.of_kind("join")
    if not joins:
        return None
    rows = {row.client: row for row in run.clients}
    titles = ("first round", "train rows", "base loss", "loss on arrival", "loss at the end")
    columns = [Column("client", number=False), *map(Column, titles)]
    cells = [_line(event, rows.get(event.client, Client(event.client))) for event in joins]
    everybody = run.provenance.get("data", {}).get("clients", [])
    return Newcomers(columns, cells, _means(joins, len(everybody) - len(joins)))


def _line(event: Event, row: Client) -> list[Cell]:
    return [
        text_cell(event.client),
        number_cell(event.round),
        number_cell(event.numbers.get("rows")),
        number_cell(event.numbers.get("base_loss"), loss_text),
        number_cell(event.numbers.get("test_loss"), loss_text),
        number_cell(row.after_align_loss, loss_text),
    ]


def _means(joins: Sequence[Event], count: int) -> str:
    """Such as "over 3 clients before round 2, over 4 from round 2 and over 5 from round 7 on"."""
    grouped = [(number, len(list(of))) for number, of in groupby(joins, lambda join: join.round)]
    first = f"over {count} clients before round {grouped[0][0]}"
    if len(grouped) == 1:
        return f"{first} and over {count + grouped[0][1]} from then on"
    parts = []
    for number, more in grouped:
        count += more
        parts.append(f"over {count} from round {number}")
    return f"{', '.join([first, *parts[:-1]])} and {parts[-1]} on"
