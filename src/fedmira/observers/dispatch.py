"""Tells observers what happens, and keeps the run safe from them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedmira.observers.base import (
    ClientEvent,
    EndEvent,
    EvaluationEvent,
    Observer,
    RoundEvent,
    StartEvent,
    Stop,
)

__all__ = ["Dispatcher", "Event"]

Event = StartEvent | ClientEvent | EvaluationEvent | RoundEvent | EndEvent

_METHODS = {
    StartEvent: "on_start",
    ClientEvent: "on_client",
    EvaluationEvent: "on_evaluation",
    RoundEvent: "on_round",
    EndEvent: "on_end",
}
_log = logging.getLogger(__name__)


class Dispatcher:
    """The observers of one run.

    Args:
        observers: are told in this order.
        report: is called with a sentence on each observer that raised and is left out from then on.

    Attributes:
        stop: what the first observer that wants to stop the run has returned, or None.
    """

    def __init__(self, observers: Sequence[Observer], report: Callable[[str], None]) -> None:
        self._observers = list(observers)
        self._report = report
        self.stop: Stop | None = None

    def tell(self, event: Event) -> None:
        """Call the method of each observer that belongs to this event."""
        method = _METHODS[type(event)]
        for observer in list(self._observers):
            answer = self._ask(observer, method, event)
            if self.stop is None and isinstance(answer, Stop) and method != "on_end":
                self.stop = answer

    def resting(self) -> frozenset[str]:
        """Clients that at least one observer wants to rest."""
        asked = [self._ask(observer, "resting") for observer in list(self._observers)]
        return frozenset(client for clients in asked for client in clients or ())

    def states(self) -> list[list[Any]]:
        """[name, state] of each observer that has something to remember, for the checkpoint."""
        asked = [
            (_name(observer), self._ask(observer, "state")) for observer in list(self._observers)
        ]
        return [[name, dict(state)] for name, state in asked if state]

    def restore(self, states: Sequence[Sequence[Any]]) -> None:
        """Give each observer what one of its class had to remember, in the order of both."""
        waiting = list(states)
        for observer in list(self._observers):
            own = next((entry for entry in waiting if entry[0] == _name(observer)), None)
            if own is not None:
                waiting.remove(own)
                self._ask(observer, "restore", own[1])

    def _ask(self, observer: Observer, method: str, *arguments: Event | Mapping[str, Any]) -> Any:
        try:
            return getattr(observer, method)(*arguments)
        except Exception as error:  # noqa: BLE001 - see the next line
            # Code of other people: whatever it raises, the run is worth more than the observer.
            self._observers.remove(observer)
            message = (
                f"the observer {_name(observer)} raised in {method} and is left out from here "
                f"on: {type(error).__name__}: {error}"
            )
            _log.warning(message, exc_info=True)
            self._report(message)
            return None


def _name(observer: Observer) -> str:
    return type(observer).__qualname__
