"""What an observer is: six methods, each called with one small event.

Each of them can stop the run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "ClientEvent",
    "EndEvent",
    "EvaluationEvent",
    "JoinEvent",
    "MeasuringEvent",
    "Observer",
    "RoundEvent",
    "RunFacts",
    "StartEvent",
    "Stop",
]


@dataclass(frozen=True, slots=True)
class Stop:
    """What an observer returns to end the run after the round at hand.

    >>> from fedmira.observers import Stop
    >>> Stop("the budget is spent").reason
    'the budget is spent'

    Attributes:
        reason: stands in run.json and in the report.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Which run an event belongs to.

    Attributes:
        id: the same in all parts of a run that was resumed; "id" in run.json.
        name: of its folder.
        config: the resolved settings by dotted key, such as {"rounds.count": 20}.
    """

    id: str
    name: str
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StartEvent:
    """A run, or the next part of one, begins.

    Attributes:
        run: which run it is.
        clients: ids of all clients.
        rounds: how many the run has.
        folder: the run folder.
        resumed: the round of the checkpoint from which it goes on, or None for a new run.
    """

    run: RunFacts
    clients: tuple[str, ...]
    rounds: int
    folder: Path
    resumed: int | None


@dataclass(frozen=True, slots=True)
class JoinEvent:
    """Clients came once the run had begun.

    Attributes:
        run: which run it is.
        round: the first that they can train in.
        clients: their ids.
    """

    run: RunFacts
    round: int
    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClientEvent:
    """A client answered in a round.

    Attributes:
        run: which run it is.
        round: its number, from 1.
        client: its id.
        metrics: of its reply, such as "loss" and "steps"; empty where it failed.
        failure: why it failed, or None.
    """

    run: RunFacts
    round: int
    client: str
    metrics: Mapping[str, float]
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class EvaluationEvent:
    """All clients were evaluated, each with the adapter that it would be given now.

    Attributes:
        run: which run it is.
        round: 0 for the base, before any training.
        test: client -> loss for each response token of its test rows.
        validation: the same for validation rows, of the clients that have such rows.
        test_loss: mean over clients.
        validation_loss: mean over clients that have validation rows; None where none has any.
    """

    run: RunFacts
    round: int
    test: Mapping[str, float]
    validation: Mapping[str, float]
    test_loss: float | None
    validation_loss: float | None


@dataclass(frozen=True, slots=True)
class MeasuringEvent:
    """Rows are being measured: told when that begins, and as parts of them are done.

    Attributes:
        run: which run it is.
        work: "evaluating" for losses, "answering" for generated answers.
        split: "test" or "validation".
        done: rows that are done.
        rows: all rows of this measurement.
        seconds_left: about how long the others take; None at the beginning.
    """

    run: RunFacts
    work: str
    split: str
    done: int
    rows: int
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class RoundEvent:
    """A round has ended and is safe on the disk.

    Attributes:
        run: which run it is.
        round: its number, from 1.
        figures: the row of rounds.csv as numbers; None where a cell is empty.
    """

    run: RunFacts
    round: int
    figures: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class EndEvent:
    """The run, or this part of it, has ended.

    Attributes:
        run: which run it is.
        status: "finished", "stopped", "interrupted" or "failed", as in run.json.
        reason: why, where it is not "finished".
        summary: figure -> its mean, weighted_mean, worst_tenth and spread; empty where nothing
            could be measured.
        folder: the run folder.
    """

    run: RunFacts
    status: str
    reason: str | None
    summary: Mapping[str, Mapping[str, float]]
    folder: Path


class Observer:
    """Does nothing; override what you need.

    The order is start, evaluation of the base, then for each round its clients, its evaluation
    where there is one, and the round; at last the end. A `Stop` from any of them but `on_end` ends
    the run once the round at hand is saved. An observer that raises an Exception is reported and
    left out; it never fails the run. One object may watch several runs, one after the other.

    >>> from fedmira.observers import EvaluationEvent, Observer, RunFacts, Stop
    >>> class UntilGood(Observer):
    ...     def on_evaluation(self, event):
    ...         return Stop("good enough") if event.test_loss < 1 else None
    >>> measured = EvaluationEvent(RunFacts("1", "first", {}), 4, {"a": 0.8}, {}, 0.8, None)
    >>> UntilGood().on_evaluation(measured)
    Stop(reason='good enough')
    """

    def on_start(self, event: StartEvent) -> Stop | None:
        """The run begins; `restore` was called before where there is a checkpoint."""

    def on_join(self, event: JoinEvent) -> Stop | None:
        """Clients came; called before the first round that they can train in."""

    def on_client(self, event: ClientEvent) -> Stop | None:
        """A client replied or failed; called in the order of client ids, after the exchange."""

    def on_evaluation(self, event: EvaluationEvent) -> Stop | None:
        """Losses of all clients were measured."""

    def on_measuring(self, event: MeasuringEvent) -> Stop | None:
        """Losses or answers are being measured, and the event says how far that is."""

    def on_round(self, event: RoundEvent) -> Stop | None:
        """A round is complete and its checkpoint written."""

    def on_end(self, event: EndEvent) -> Stop | None:
        """The run has ended in whatever way; what is returned changes nothing."""

    def resting(self) -> Collection[str]:
        """Clients that are not to train for now; asked before each round."""
        return ()

    def state(self) -> Mapping[str, Any]:
        """What a resume must give back, as JSON values; part of the checkpoint.

        It is asked for after `on_client` and `on_evaluation` of a round and before its `on_round`.
        """
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave at the checkpoint from which the run goes on."""
