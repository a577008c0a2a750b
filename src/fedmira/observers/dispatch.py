"""Tells observers what happens, and keeps the run safe from them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from fedmira.errors import ConfigError, FedmiraError
from fedmira.observers.base import (
    ClientEvent,
    EndEvent,
    EvaluationEvent,
    JoinEvent,
    MeasuringEvent,
    Observer,
    RoundEvent,
    StartEvent,
    Stop,
)

__all__ = ["Dispatcher", "Event", "check_observers"]

Event = (
    StartEvent | JoinEvent | ClientEvent | MeasuringEvent | EvaluationEvent | RoundEvent | EndEvent
)

_METHODS = {
    StartEvent: "on_start",
    JoinEvent: "on_join",
    ClientEvent: "on_client",
    MeasuringEvent: "on_measuring",
    EvaluationEvent: "on_evaluation",
    RoundEvent: "on_round",
    EndEvent: "on_end",
}
_log = logging.getLogger(__name__)


class Dispatcher:
    """The observers of one run.

    Args:
        observers: are told in this order.
        report: is called with a sentence on each observer that raised and is left out from then on,
            and on each whose answer cannot be used.

    Attributes:
        stop: what the first observer that wants to stop the run has returned, or None.

    Raises:
        ConfigError: something among the observers is none.
    """

    def __init__(self, observers: Sequence[Observer], report: Callable[[str], None]) -> None:
        check_observers(observers)
        self._observers = list(observers)
        self._report = report
        self._clients: frozenset[str] | None = None
        self._warned: set[str] = set()
        self.stop: Stop | None = None

    def tell(self, event: Event) -> None:
        """Call the method of each observer that belongs to this event."""
        method = _METHODS[type(event)]
        if isinstance(event, StartEvent):
            self._clients = frozenset(event.clients)
        elif isinstance(event, JoinEvent) and self._clients is not None:
            self._clients |= {*event.clients}
        for observer in list(self._observers):
            answer = self._ask(observer, method, event)
            if self.stop is None and isinstance(answer, Stop) and method != "on_end":
                self.stop = answer
            elif answer is not None and not isinstance(answer, Stop):
                self._warn(
                    f"the observer {_name(observer)} returned {answer!r} from {method}, which does "
                    "nothing; return fedmira.observers.Stop(reason) to end the run, or None"
                )

    def resting(self) -> frozenset[str]:
        """Clients that at least one observer wants to rest."""
        resting: set[str] = set()
        for observer in list(self._observers):
            clients = self._ask(observer, "resting")
            if clients is None:
                continue
            if isinstance(clients, str) or not isinstance(clients, Collection):
                self._warn(
                    f"the observer {_name(observer)} returned {clients!r} from resting, which does "
                    "nothing; return a set of client ids"
                )
                continue
            unknown = [] if self._clients is None else sorted(set(clients) - self._clients)
            if unknown:
                self._warn(
                    f"the observer {_name(observer)} lets clients rest that this run does not "
                    f"have: {', '.join(map(repr, unknown[:5]))}"
                )
            resting.update(clients)
        return frozenset(resting)

    def states(self) -> list[list[Any]]:
        """[name, state] of each observer that has something to remember, for the checkpoint."""
        found = []
        for observer in list(self._observers):
            state = self._ask(observer, "state")
            if not state:
                continue
            try:
                json.dumps(state)
                found.append([_name(observer), dict(state)])
            except (TypeError, ValueError) as error:
                self._warn(
                    f"the observer {_name(observer)} returned a state that no checkpoint can hold "
                    f"({error}); return a dict of JSON values. A resume gives it nothing back"
                )
        return found

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
            _log.warning(message, exc_info=not isinstance(error, FedmiraError))
            self._report(message)
            return None

    def _warn(self, message: str) -> None:
        """Says something once."""
        if message not in self._warned:
            self._warned.add(message)
            _log.warning(message)
            self._report(message)


def check_observers(observers: Sequence[Observer]) -> None:
    """Refuses what is no observer.

    Raises:
        ConfigError: it is no list, or something in it is no object of an `Observer`.
    """
    if not isinstance(observers, Sequence) or isinstance(observers, str):
        raise ConfigError(f"observers is {observers!r}; give a list of them: observers=[...]")
    for each in observers:
        if isinstance(each, type):
            raise ConfigError(
                f"observers: {each.__qualname__} is a class; give an object of it: "
                f"{each.__qualname__}()"
            )
        if not isinstance(each, Observer):
            raise ConfigError(
                f"observers: {each!r} is no observer; give an object of a class that extends "
                "fedmira.Observer"
            )


def _name(observer: Observer) -> str:
    return type(observer).__qualname__
