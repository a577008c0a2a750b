"""What the user sees: progress, tables, and JSON."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.table import Table

from fedmira.observers import Progress
from fedmira.shown import plain

__all__ = ["logged", "print_json", "print_table", "progress", "say", "tell", "tell_answer"]

_NAME_WIDTH = 16
_PIPE_WIDTH = 400  # a pipe has no width to keep to
_PIPE = None if sys.stdout.isatty() else _PIPE_WIDTH
# Texts are shown as they are: a name in brackets is no style.
_out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=_PIPE)
_err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def say(text: str) -> None:
    """A line on stderr, so that stdout stays for results."""
    _err.print(plain(text, lines=True))


def tell(text: object, *, end: str = "\n", error: bool = False) -> None:
    """A line of a result on stdout, as it may be shown on a terminal.

    Args:
        text: or what becomes one.
        end: what follows it.
        error: on stderr instead.
    """
    print(plain(str(text), lines=True), end=end, file=sys.stderr if error else sys.stdout)


def tell_answer(text: str) -> None:
    """What a model answered: as it is to a program, and as it may be shown to a terminal.

    Args:
        text: of the model.
    """
    print(plain(text, lines=True) if sys.stdout.isatty() else text, flush=True)


class _Said(logging.Handler):
    """Says what the library logs, each line once: runs on the same rows have the same notes."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Say a line that was not said before."""
        text = record.getMessage()
        if text not in self._said:
            self._said.add(text)
            say(text)


@contextmanager
def logged() -> Iterator[None]:
    """Within the block, what the library logs is said as it is, whoever else set up logging."""
    log, handler = logging.getLogger("fedmira"), _Said()
    before = log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield
    finally:
        log.propagate = before
        log.removeHandler(handler)


def print_json(value: object) -> None:
    """One JSON document on stdout.

    Numbers that are not finite, which JSON cannot say, become null.
    """
    sys.stdout.write(json.dumps(_finite(value), indent=1, default=str, allow_nan=False) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout: numbers are right-aligned with three decimals and never cut.

    Names and headings fold where it is narrow.
    """
    table = Table(title=plain(title), title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        numeric = any(isinstance(row[i], (int, float)) for row in rows)
        longest = max((len(_cell(row[i])) for row in rows), default=0)
        justify: Literal["left", "right"] = "right" if numeric else "left"
        table.add_column(
            plain(column),
            justify=justify,
            overflow="fold",
            min_width=longest if numeric else min(longest, _NAME_WIDTH),
        )
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    _out.print(table)


def progress(label: str = "") -> Progress:
    """Shows on stderr how far a run is; `label` in place of the name of its folder."""
    return Progress(_err, label)


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return plain(str(value), lines=True)
    return f"{value:.3f}"
