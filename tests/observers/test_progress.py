"""What the screen says while rows are measured."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedmira.observers import MeasuringEvent, Progress, RunFacts, StartEvent, progress

RUN = RunFacts("1", "first", {})


class Clock:
    """Seconds as the test says."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def told(seconds: dict[float, tuple[int, float | None]], clock: Clock) -> list[str]:
    """The lines of a measurement of 10,000 rows: time -> rows that are done, and seconds left."""
    text = io.StringIO()
    screen = Progress(Console(file=text, width=200))
    screen.on_start(StartEvent(RUN, ("a",), 3, Path("runs/first"), None))
    for clock.now, (done, left) in seconds.items():
        screen.on_measuring(MeasuringEvent(RUN, "evaluating", "test", done, 10_000, left))
    return text.getvalue().splitlines()


def test_long_measurements_say_how_far_they_are(clock: Clock) -> None:
    lines = told(
        {0: (0, None), 4: (800, 46.0), 16: (3200, 34.4), 20: (4000, 30.0), 50: (10_000, 0.0)}, clock
    )
    assert lines == ["first: evaluating 3,200 of 10,000 test rows, about 34 s left"], (
        "at most a line in ten seconds, and none when it is over"
    )


def test_short_measurements_say_nothing(clock: Clock) -> None:
    assert told({0: (0, None), 3: (5000, 3.0), 6: (10_000, 0.0)}, clock) == []


def test_a_bar_shows_each_step() -> None:
    text = io.StringIO()
    screen = Progress(Console(file=text, width=200, force_terminal=True))
    screen.on_start(StartEvent(RUN, ("a",), 3, Path("runs/first"), None))
    screen.on_measuring(MeasuringEvent(RUN, "answering", "test", 1200, 10_000, 12.0))
    assert screen._bar is not None
    screen._bar.refresh()
    assert "answering 1,200 of 10,000 test rows, about 12 s left" in text.getvalue()
    screen.on_measuring(MeasuringEvent(RUN, "answering", "test", 10_000, 10_000, 0.0))
    assert screen._bar.tasks[0].description == "first"
    screen._bar.stop()
