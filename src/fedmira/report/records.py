"""A run folder as frozen values: what was written there, with None for what was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fedmira.metrics import LOSS_METRICS

__all__ = ["Client", "Event", "Round", "Run", "TaskGraph", "ValidationRow"]


@dataclass(frozen=True, slots=True)
class Client:
    """A row of metrics/clients.csv; losses are per response token, None where not measured.

    Attributes:
        client, task, category: as in the table; "" where it says none.
        rank, train_rows, test_rows, test_tokens, rounds_trained: numbers of the table.
        base_loss, before_align_loss, after_align_loss: on test rows.
        best_round, best_validation_loss, best_test_loss: of the round that the client's validation
            rows choose.
        scores: name of a text metric -> the client's figure, of those that were measured.
    """

    client: str
    task: str = ""
    category: str = ""
    rank: float | None = None
    train_rows: float | None = None
    test_rows: float | None = None
    test_tokens: float | None = None
    rounds_trained: float | None = None
    base_loss: float | None = None
    before_align_loss: float | None = None
    after_align_loss: float | None = None
    best_round: float | None = None
    best_validation_loss: float | None = None
    best_test_loss: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)

    def figure(self, metric: str) -> float | None:
        """A metric of the table by its name."""
        if metric in LOSS_METRICS:
            value: float | None = getattr(self, metric)
            return value
        return self.scores.get(metric)


@dataclass(frozen=True, slots=True)
class ValidationRow:
    """A row of metrics/validation.csv: a client's validation row under its saved adapter.

    Attributes:
        client: its id.
        row: its number among the client's validation rows, from 0.
        tokens: of its response.
        loss: their sum in nats; None where it is not finite.
    """

    client: str
    row: float | None = None
    tokens: float | None = None
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """A row of metrics/rounds.csv; None where not measured.

    Attributes:
        round, clients: its number, and the clients whose reply was used.
        train_loss, train_loss_weighted: while training, each client alike and by tokens.
        test_loss, test_loss_weighted: of all clients, each alike and by tokens.
        disagreement_before, disagreement_after: of related clients, around the server's step.
        pull, pull_kept: shares, mean over clients.
        train_seconds, evaluate_seconds: of the exchange and of the evaluation.
        tokens_per_second: response tokens that were trained.
        bytes_up, bytes_down: of all clients.
    """

    round: float
    clients: float | None = None
    train_loss: float | None = None
    train_loss_weighted: float | None = None
    test_loss: float | None = None
    test_loss_weighted: float | None = None
    disagreement_before: float | None = None
    disagreement_after: float | None = None
    pull: float | None = None
    pull_kept: float | None = None
    train_seconds: float | None = None
    evaluate_seconds: float | None = None
    tokens_per_second: float | None = None
    bytes_up: float | None = None
    bytes_down: float | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """A line of events.jsonl: its kind, round, client ("" for none), finite numbers and texts.

    Attributes:
        kind: such as "train" or "evaluate".
        round: its number, 0 for the base.
        client: its id.
        numbers: key -> finite number.
        texts: key -> text.
    """

    kind: str
    round: int
    client: str
    numbers: Mapping[str, float]
    texts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TaskGraph:
    """graph.json: every edge once, as (source, target, weight).

    Attributes:
        kind: how it was made.
        clients: ids.
        edges: with weights above 0.
    """

    kind: str
    clients: tuple[str, ...]
    edges: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Everything a report says about a run.

    Attributes:
        folder: the run folder.
        settings: config.toml parsed.
        settings_text: config.toml itself.
        provenance: run.json parsed.
        status: as in run.json.
        error: why it failed or ended early; "" where it did not.
        started: when the run began; None where run.json does not say.
        summary: figure (such as "after_align_loss") -> statistic ("mean", "worst_tenth", ...) ->
            value; empty where a run failed early.
        clients: rows of metrics/clients.csv.
        validation: rows of metrics/validation.csv; empty where rows are on other machines.
        rounds: rows of metrics/rounds.csv.
        events: lines of events.jsonl.
        graph: of graph.json, None where there is none.
        adapters: client -> its entry of adapters/index.json.
        notes: what was left out while reading, one sentence each: a line cut off by a crash, a
            number that is not finite.
    """

    folder: Path
    settings: Mapping[str, Any]
    settings_text: str
    provenance: Mapping[str, Any]
    status: str
    error: str
    started: datetime | None
    summary: Mapping[str, Mapping[str, float]]
    clients: tuple[Client, ...]
    validation: tuple[ValidationRow, ...]
    rounds: tuple[Round, ...]
    events: tuple[Event, ...]
    graph: TaskGraph | None
    adapters: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]

    @property
    def algorithm(self) -> str:
        """The algorithm's name in the config."""
        section = self.settings.get("algorithm", {})
        return str(section.get("name", "mira")) if isinstance(section, Mapping) else "mira"

    def series(self, kind: str, number: str) -> dict[str, list[tuple[int, float]]]:
        """One number of one kind of event, as client -> (round, value) by rising round.

        Of two events of a round the later one counts.

        Args:
            kind: of event, such as "evaluate".
            number: the key of the number.
        """
        values: dict[str, dict[int, float]] = {}
        for event in self.events:
            if event.kind == kind and number in event.numbers:
                values.setdefault(event.client, {})[event.round] = event.numbers[number]
        return {client: sorted(of_round.items()) for client, of_round in values.items()}

    def of_kind(self, kind: str) -> list[Event]:
        """All events of one kind, in the order they were written."""
        return [event for event in self.events if event.kind == kind]
