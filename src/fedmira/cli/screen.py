"""What the user sees: progress on a terminal, plain lines elsewhere, tables, and JSON."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

__all__ = ["print_json", "print_table", "say", "show_progress"]

_NAME_WIDTH = 16
_PIPE_WIDTH = 400  # a pipe has no width to keep to
_out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """A line on stderr, so that stdout stays for results."""
    _err.print(text, markup=False)


def print_json(value: object) -> None:
    """One JSON document on stdout.

    Numbers that are not finite, which JSON cannot say, become null.
    """
    sys.stdout.write(json.dumps(_finite(value), indent=1, default=str, allow_nan=False) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout: numbers are right-aligned with three decimals and never cut.

    Names and headings fold where it is narrow.
    """
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        numeric = any(isinstance(row[i], (int, float)) for row in rows)
        longest = max((len(_cell(row[i])) for row in rows), default=0)
        justify: Literal["left", "right"] = "right" if numeric else "left"
        table.add_column(
            column,
            justify=justify,
            overflow="fold",
            min_width=longest if numeric else min(longest, _NAME_WIDTH),
        )
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    _out.print(table)


@contextmanager
def show_progress(label: str, rounds: int) -> Iterator[Any]:
    """Yields a progress callback.

    A bar with the time left on a terminal, a line a round elsewhere.
    """
    if not _err.is_terminal:
        yield _plain_lines(label, rounds)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_err) as bar:
        task = bar.add_task(f"{label} (evaluating the base)", total=rounds, figures="")
        shown: dict[str, str] = {}

        def update(what: str, figures: Mapping[str, Any]) -> None:
            shown.update(_shown(figures))
            done = figures["round"] if what == "round" else None
            bar.update(task, description=label, completed=done, figures="  ".join(shown.values()))

        yield update


def _plain_lines(label: str, rounds: int) -> Any:
    begun = time.monotonic()
    first: list[int] = []

    def update(what: str, figures: Mapping[str, Any]) -> None:
        number = int(figures["round"])
        if what == "evaluate":
            if number == 0:
                say(f"{label}: the base has test loss {figures['test_loss']:.3f}")
            return
        first.append(number)
        left = (time.monotonic() - begun) / len(first) * (rounds - number)
        say(
            f"{label}: round {number}/{rounds}  {'  '.join(_shown(figures).values())}  "
            f"about {left:.0f} s left"
        )

    return update


def _shown(figures: Mapping[str, Any]) -> dict[str, str]:
    names = {"train_loss": "train", "test_loss": "test", "pull": "pull"}
    return {
        name: f"{label} {figures[name]:.3f}"
        for name, label in names.items()
        if isinstance(figures.get(name), float)
    }


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.3f}"
