"""Shows how far a run is: a bar in terminals and notebooks, a line a round elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)

from fedmira.observers.base import (
    EndEvent,
    EvaluationEvent,
    MeasuringEvent,
    Observer,
    RoundEvent,
    StartEvent,
)
from fedmira.shown import plain

__all__ = ["Progress"]

_BETWEEN_SECONDS = 10.0
"""Between two lines on a measurement, where there is no bar."""

_SHOWN = {"train_loss": "train", "test_loss": "test", "pull": "pull"}


class Progress(Observer):
    """A bar with the time left, or a plain line for each round.

    Args:
        console: where to; standard error, if it is not given.
        label: stands before the figures; the name of the run's folder, if it is not given.
    """

    def __init__(self, console: Console | None = None, label: str = "") -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._label = label
        self._name, self._rounds = label, 0
        self._shown: dict[str, str] = {}
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._begun, self._done = 0.0, 0
        self._said = 0.0

    def on_start(self, event: StartEvent) -> None:
        """Show the empty bar, where there can be one."""
        self._name, self._rounds = plain(self._label or event.run.name), event.rounds
        self._begun, self._done, self._shown = time.monotonic(), 0, {}
        if not (self._console.is_terminal or self._console.is_jupyter):
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=self._console)
        first = self._name if event.resumed is not None else f"{self._name} (evaluating the base)"
        self._task = self._bar.add_task(
            first, total=event.rounds, completed=event.resumed or 0, figures=""
        )
        self._bar.start()

    def on_measuring(self, event: MeasuringEvent) -> None:
        """Show how many rows are measured, and about how long the others will take."""
        told = f"{event.work} {event.done:,} of {event.rows:,} {event.split} rows"
        if event.seconds_left is not None:
            told += f", about {event.seconds_left:.0f} s left"
        if self._bar is not None:
            going_on = event.done < event.rows
            shown = f"{self._name} ({told})" if going_on else self._name
            self._bar.update(self._task, description=shown)
        elif event.seconds_left is None:
            self._said = time.monotonic()
        elif event.done < event.rows and time.monotonic() - self._said >= _BETWEEN_SECONDS:
            self._said = time.monotonic()
            self._say(told)

    def on_evaluation(self, event: EvaluationEvent) -> None:
        """Show the mean test loss."""
        if event.test_loss is None:
            return
        if self._bar is not None:
            self._update({"test_loss": event.test_loss}, None)
        elif event.round == 0:
            self._say(f"the base has test loss {event.test_loss:.3f}")

    def on_round(self, event: RoundEvent) -> None:
        """Show the round's figures and about how long the others will take."""
        if self._bar is not None:
            self._update(event.figures, event.round)
            return
        self._done += 1
        left = (time.monotonic() - self._begun) / self._done * (self._rounds - event.round)
        figures = "  ".join(_shown(event.figures).values())
        self._say(f"round {event.round}/{self._rounds}  {figures}  about {left:.0f} s left")

    def on_end(self, event: EndEvent) -> None:
        """Take the bar away, and say so where the run was stopped."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if event.status == "stopped":
            self._say(f"stopped: {event.reason}")

    def _update(self, figures: Mapping[str, float | None], done: int | None) -> None:
        assert self._bar is not None
        self._shown.update(_shown(figures))
        self._bar.update(
            self._task,
            description=self._name,
            completed=done,
            figures="  ".join(self._shown.values()),
        )

    def _say(self, text: str) -> None:
        self._console.print(plain(f"{self._name}: {text}"), markup=False, emoji=False)


def _shown(figures: Mapping[str, float | None]) -> dict[str, str]:
    return {
        name: f"{label} {value:.3f}"
        for name, label in _SHOWN.items()
        if isinstance(value := figures.get(name), float)
    }
