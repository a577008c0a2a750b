"""Small tables for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from fedmira.shown import html_text

__all__ = ["html_table"]


def html_table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A table with a head; all text is escaped, and a cell without a value is empty.

    Args:
        columns: the names in the head, in order.
        rows: the cells of each row, one per column.
    """
    heads = "".join(f"<th>{html.escape(html_text(column))}</th>" for column in columns)
    lines = (
        "<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.3f}"
    return "" if value is None else html.escape(html_text(str(value)))
