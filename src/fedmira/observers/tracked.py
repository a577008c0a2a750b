"""What all trackers share: which figures of a run go to them, under which names."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fedmira.errors import ConfigError
from fedmira.observers.base import (
    EndEvent,
    EvaluationEvent,
    Observer,
    RoundEvent,
    StartEvent,
)

__all__ = ["Tracker", "needed"]


class Tracker(Observer, ABC):
    """Sends the figures of each round to another program; subclasses say how.

    Names are "round/train_loss" and the like for the columns of rounds.csv, "evaluation/test_loss"
    and "evaluation/validation_loss" for means over clients, "clients/<id>/test_loss" for single
    clients where `per_client` is on, and "summary/<figure>" at the end. Numbers that are not finite
    are left out.

    Args:
        per_client: send each client's losses too.
    """

    def __init__(self, per_client: bool = False) -> None:
        self._per_client = per_client
        self._round = 0

    @abstractmethod
    def begin(self, event: StartEvent) -> None:
        """Open a run of the tracker; of a run that is resumed, go on with the one there was."""

    @abstractmethod
    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Send figures of a round.

        Args:
            figures: name -> number.
            step: the round, 0 for the base.
        """

    @abstractmethod
    def finish(self, event: EndEvent) -> None:
        """Close the run of the tracker."""

    def on_start(self, event: StartEvent) -> None:
        """Open the tracker's run."""
        self._round = event.resumed or 0
        self.begin(event)

    def on_evaluation(self, event: EvaluationEvent) -> None:
        """Send mean losses, and those of clients where they are wanted."""
        self._round = event.round
        figures: dict[str, Any] = {
            "evaluation/test_loss": event.test_loss,
            "evaluation/validation_loss": event.validation_loss,
        }
        if self._per_client:
            for name, losses in (("test", event.test), ("validation", event.validation)):
                figures |= {f"clients/{client}/{name}_loss": v for client, v in losses.items()}
        self._send(figures)

    def on_round(self, event: RoundEvent) -> None:
        """Send the row of rounds.csv."""
        self._round = event.round
        self._send({f"round/{k}": v for k, v in event.figures.items() if k != "round"})

    def on_end(self, event: EndEvent) -> None:
        """Send the means of the summary and close the tracker's run."""
        try:
            self._send({f"summary/{name}": v["mean"] for name, v in event.summary.items()})
        finally:
            self.finish(event)

    def _send(self, figures: Mapping[str, float | None]) -> None:
        known = {k: float(v) for k, v in figures.items() if v is not None and math.isfinite(v)}
        if known:
            self.log(known, self._round)


def needed(library: str) -> Any:
    """An optional library.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec(library) is None:
        raise ConfigError(
            f"{library} is not installed; install it with: pip install 'fedmira[{library}]'"
        )
    return import_module(library)
