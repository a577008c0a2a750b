"""A heat map as a table: a row per client, a column per method.

The colour of a cell says how far the method lies from the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedmira.report.charts import element, percent_text

__all__ = ["SHIFT_BOUNDS", "HeatCell", "HeatRow", "heat_map", "shift", "shift_keys"]

SHIFT_BOUNDS = (
    -0.2,
    -0.1,
    -0.02,
    0.02,
    0.1,
    0.2,
)  # relative differences between one colour and the next

_LARGEST = 9.99  # a larger change is told as a multiple, which fits its cell


@dataclass(frozen=True, slots=True)
class HeatCell:
    """A client under a method.

    Attributes:
        change: relative difference to the baseline; below 0 is a gain.
        beyond_noise: sets the number in bold.
        told: for the hover text, behind client and method.
    """

    change: float
    beyond_noise: bool
    told: str


@dataclass(frozen=True, slots=True)
class HeatRow:
    """A client: its training rows, as text, and a cell per method, None where not measured.

    Attributes:
        client: its id.
        train_rows: its training rows, as text.
        cells: one for each method.
    """

    client: str
    train_rows: str
    cells: Sequence[HeatCell | None]


def shift(change: float) -> int:
    """The colour of a relative difference.

    0 for the greatest gain, 3 for about equal, 6 for the greatest loss.
    """
    return sum(change >= bound if bound > 0 else change > bound for bound in SHIFT_BOUNDS)


def shift_keys() -> list[str]:
    """What the colours mean, in their order."""
    low, *between, high = SHIFT_BOUNDS
    pairs = zip((low, *between), (*between, high), strict=True)
    middle = [f"{percent_text(start)} to {percent_text(end)}" for start, end in pairs]
    return [f"below {percent_text(low)}", *middle, f"{percent_text(high)} or more"]


def heat_map(methods: Sequence[str], rows: Sequence[HeatRow], label: str) -> Markup:
    """Make the table.

    Args:
        methods: the columns.
        rows: the clients from top to bottom, each with a cell per method.
        label: what it shows, for screen readers.

    Returns:
        A <table>, or nothing where there is no row or no method.
    """
    if not rows or not methods:
        return Markup("")
    corner = element("th", "client", scope="col", class_="name")
    training = element("th", "train rows", scope="col", class_="number")
    titles = [
        element("th", element("span", method, title=method), scope="col", class_="method")
        for method in methods
    ]
    lines = [element("tr", *_line(row, methods)) for row in rows]
    return element(
        "table",
        element("thead", element("tr", corner, training, *titles)),
        element("tbody", *lines),
        aria_label=label,
        class_="heat-map",
    )


def _line(row: HeatRow, methods: Sequence[str]) -> list[Markup]:
    """The cells of a client; the name is cut by the style, and told in full on hover."""
    return [
        element("th", element("span", row.client, title=row.client), scope="row"),
        element("td", row.train_rows, class_="number"),
        *(
            _cell(f"{row.client}, {method}: {cell.told}", cell) if cell else element("td")
            for method, cell in zip(methods, row.cells, strict=True)
        ),
    ]


def _cell(told: str, cell: HeatCell) -> Markup:
    shown = (
        percent_text(cell.change)
        if cell.change <= _LARGEST
        else f"\N{MULTIPLICATION SIGN}{1 + cell.change:.0f}"
    )
    beyond = " beyond" if cell.beyond_noise else ""
    return element("td", shown, title=told, class_=f"shift-{shift(cell.change)}{beyond}")
