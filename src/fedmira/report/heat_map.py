"""A heat map as inline SVG: a row per client, a column per method, the colour says how far the method lies from the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedmira.report.charts import (
    CHARACTER_WIDTH,
    FONT,
    element,
    percent_text,
)

__all__ = ["SHIFT_BOUNDS", "HeatCell", "HeatRow", "heat_map", "shift", "shift_keys"]

SHIFT_BOUNDS = (
    -0.2,
    -0.1,
    -0.02,
    0.02,
    0.1,
    0.2,
)  # relative differences between one colour and the next

_CELL = (52, 19)
_LONGEST_NAME = 30
_LARGEST = 9.99  # a larger change is told as a multiple, which fits its cell
_TURN = -35.0  # degrees of the methods' names
_RISE = 0.58  # of a name's length, upwards at that angle


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
    """A client: its training rows, as text, and a cell per method, None where not measured."""

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
    """Draw it.

    Args:
        methods: the columns.
        rows: the clients from top to bottom, each with a cell per method.
        label: what it shows, for screen readers, which are given no cells: a table holds the same
            numbers.

    Returns:
        An <svg> of its natural size, or nothing where there is no row or no method.
    """
    if not rows or not methods:
        return Markup("")
    width, height = _CELL
    names = [_shortened(row.client) for row in rows]
    left = 8 + FONT * CHARACTER_WIDTH * max(map(len, names))
    cells_left = left + 8 + FONT * CHARACTER_WIDTH * max(4, *(len(row.train_rows) for row in rows))
    titles = [_shortened(method) for method in methods]
    longest = max(map(len, titles)) * FONT * CHARACTER_WIDTH
    top = 12 + FONT + _RISE * longest
    parts = [element("text", "rows", x=cells_left - 8, y=top - 6, text_anchor="end")]
    for column, (title, method) in enumerate(zip(titles, methods, strict=True)):
        x, y = cells_left + (column + 0.4) * width, top - 6
        turned = f"translate({x:.1f} {y:.1f}) rotate({_TURN:g})"
        parts.append(
            element("text", element("title", method), title, transform=turned, class_="strong")
        )
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        y = top + number * height
        parts.append(
            element(
                "text",
                element("title", row.client),
                name,
                x=left,
                y=y + 0.72 * height,
                text_anchor="end",
            )
        )
        parts.append(
            element(
                "text", row.train_rows, x=cells_left - 8, y=y + 0.72 * height, text_anchor="end"
            )
        )
        for column, (method, cell) in enumerate(zip(methods, row.cells, strict=True)):
            if cell is not None:
                parts.append(
                    _cell(
                        f"{row.client}, {method}: {cell.told}", cell, cells_left + column * width, y
                    )
                )
    full_width = (
        cells_left + len(methods) * width + 0.85 * longest
    )  # the last name leans out to the right
    full_height = top + len(rows) * height + 2
    return element(
        "svg",
        *parts,
        viewBox=f"0 0 {full_width:.0f} {full_height:.0f}",
        width=f"{full_width:.0f}",
        height=f"{full_height:.0f}",
        role="img",
        aria_label=label,
        class_="heat-map",
        font_size=FONT,
    )


def _cell(told: str, cell: HeatCell, x: float, y: float) -> Markup:
    width, height = _CELL
    box = element(
        "rect",
        x=x + 0.5,
        y=y + 0.5,
        width=width - 1,
        height=height - 1,
        class_=f"shift-{shift(cell.change)}",
    )
    style = "value strong" if cell.beyond_noise else "value"
    shown = (
        percent_text(cell.change)
        if cell.change <= _LARGEST
        else f"\N{MULTIPLICATION SIGN}{1 + cell.change:.0f}"
    )
    text = element(
        "text", shown, x=x + width / 2, y=y + 0.72 * height, text_anchor="middle", class_=style
    )
    return element("g", element("title", told), box, text)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
