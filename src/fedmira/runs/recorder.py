"""What is written down after each round.

Events, a line of rounds.csv, evaluations and the checkpoint.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from typing import Any

from fedmira.adapters import Adapter, LazyAdapters, content_hash, digest
from fedmira.clients import Clients, Measuring
from fedmira.config import Config
from fedmira.graphs import Graph, graph_of, graph_text
from fedmira.messages import ClientId
from fedmira.methods import Method, ServerState
from fedmira.metrics import TokenLoss
from fedmira.observers import (
    ClientEvent,
    Dispatcher,
    EvaluationEvent,
    JoinEvent,
    MeasuringEvent,
    Observer,
    RoundEvent,
    RunFacts,
)
from fedmira.rounds import RoundOutcome
from fedmira.runs.checkpoint import Checkpoint, CheckpointFolder
from fedmira.runs.events import (
    EventLine,
    align_events,
    evaluate_event,
    failure_event,
    join_event,
    round_event,
    round_row,
    train_events,
)
from fedmira.runs.folder import RunFolder
from fedmira.runs.measured import Best, Measured, rows_here
from fedmira.storage import AdapterTable

__all__ = ["NEWCOMERS", "Recorder"]

NEWCOMERS = "newcomers"
"""In a checkpoint's values: who came once the run had begun, with the round, as run.json has it."""

_SMALL_PULL = 1e-3
_log = logging.getLogger("fedmira")


@dataclass
class Recorder:
    """Observes the round loop and writes the run folder.

    Everything it must remember is in the checkpoint.

    No adapter stays in memory here: they lie in the checkpoint's store.

    Attributes:
        config: of the run.
        folder: the run folder.
        algorithm: the method, built for these clients.
        clients: who trains and measures.
        checkpoints: where checkpoints are written.
        facts: which run this is.
        observers: who is told what happens in it.
        spent_seconds: wall time of the parts of this run that came before.
        until: a round to be evaluated because the run is held after it, or None.
        uploaded: each client's last adapter before alignment.
        best_adapters, best: each client's adapter at its lowest validation loss, and the figures of
            that round.
        rounds_trained: rounds in which each client's reply was used.
        came: newcomer -> the first round that it could train in.
        rounds_asked: rounds in which each client was asked to train; kept of private runs alone.
        ever_moved: whether alignment has moved any adapter so far.
        warned: whether the run has been told that alignment moves nothing.
        graph: the graph that acted last.
        graph_json: the content of graph.json.
        base_losses: losses of all test rows before round 1.
        latest: test losses of round `latest_round`, of the rows that evaluations show.
        measured, shown: what is known of all rows, and of those that evaluations show.
        latest_round: the last evaluated round, -1 before the first.
        round_done: of the last checkpoint.
    """

    config: Config
    folder: RunFolder
    algorithm: Method
    clients: Clients
    checkpoints: CheckpointFolder
    facts: RunFacts
    observers: Sequence[Observer] = ()
    spent_seconds: float = 0.0
    until: int | None = None
    uploaded: AdapterTable = field(init=False)
    best_adapters: AdapterTable = field(init=False)
    best: dict[ClientId, Best] = field(default_factory=dict)
    rounds_trained: dict[ClientId, int] = field(default_factory=dict)
    rounds_asked: dict[ClientId, int] = field(default_factory=dict)
    came: dict[ClientId, int] = field(default_factory=dict)
    ever_moved: bool = False
    warned: bool = False
    graph: Graph | None = None
    graph_json: str = ""
    base_losses: dict[ClientId, TokenLoss] = field(default_factory=dict)
    latest: dict[ClientId, TokenLoss] = field(default_factory=dict)
    latest_round: int = -1
    round_done: int = 0

    def __post_init__(self) -> None:
        self.uploaded = self.best_adapters = AdapterTable(self.checkpoints.store, {})
        self.watchers = Dispatcher(self.observers, self._note_warning)
        self.measured = self.shown = Measured(self.clients)
        if (here := rows_here(self.clients)) is not None:
            here.heard = self._tell_measuring
            if most := self.config.evaluation.rows:
                self.shown = Measured(here.few(most, self.config.seed))
        self._begun = time.monotonic()
        self._given: tuple[ServerState, LazyAdapters, Mapping[ClientId, float]] | None = None
        self._losses: dict[str, object] = {}
        self._number = 0  # of the round at hand

    @property
    def wall_seconds(self) -> float:
        """Wall time of the run so far, over all its parts."""
        return self.spent_seconds + time.monotonic() - self._begun

    @property
    def shows_few(self) -> bool:
        """Whether evaluations during the run measure a part of the rows."""
        return self.shown is not self.measured

    def begin(self, state: ServerState) -> None:
        """Evaluate the start adapters (the base model) and write the checkpoint of round 0."""
        self.folder.append_events(self._evaluate(0, state))
        self.base_losses = (
            self.measured.losses(self.given(state)[0], "test")
            if self.shows_few
            else dict(self.latest)
        )
        self._note_losses()
        self._checkpoint(0, state)

    def admit(
        self,
        number: int,
        algorithm: Method,
        state: ServerState,
        starts: Mapping[ClientId, Adapter],
    ) -> None:
        """Measure newcomers, write them down, and write the checkpoint before their first round.

        Args:
            number: of that round.
            algorithm: the method, built for all clients.
            state: of the server, with the newcomers.
            starts: their start adapters, which are the base model.
        """
        self.algorithm, self._given, self._number = algorithm, None, number
        given = {client: algorithm.adapter_for(state, client) for client in starts}
        base = self.clients.losses(starts)
        # Who did not answer once is not waited for again.
        absent = self.clients.unmeasured()
        gone = {failure.client_id for failure in absent}
        there = {client: adapter for client, adapter in given.items() if client not in gone}
        test, validation = (self.clients.losses(there, part) for part in ("test", "validation"))
        absent += self.clients.unmeasured()
        self.base_losses |= base
        self.came |= dict.fromkeys(starts, number)
        self._note_losses()
        parties = self.clients.parties
        self.folder.append_events(
            [
                join_event(number, parties[client], *(of.get(client) for of in measured))
                for client, measured in dict.fromkeys(starts, (base, test, validation)).items()
            ]
            + [failure_event(replace(failure, round=number)) for failure in absent]
        )
        for client in starts:
            _log.info("client %s joins the run with round %d", client, number)
        # What observers make of it belongs to the checkpoint: a resume does not tell them again.
        self.watchers.tell(JoinEvent(self.facts, number, tuple(starts)))
        self._checkpoint(number - 1, state)

    def warn(self, number: int, messages: Sequence[str]) -> None:
        """Write sentences into events.jsonl.

        Args:
            number: of the round at hand, or that comes next.
            messages: the sentences.
        """
        self.folder.append_events(
            [{"event": "warning", "round": number, "message": message} for message in messages]
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up where a checkpoint stopped."""
        values: Any = checkpoint.values
        self.return_to(checkpoint)
        # A part that was killed left no total in run.json; one that ended did, and went on for a
        # while after its checkpoint.
        self.spent_seconds = max(self.spent_seconds, values["wall_seconds"])
        if self.graph_json:
            self.folder.write_text("graph.json", self.graph_json)
        self.folder.cut_back(values["sizes"])
        self._number = checkpoint.round
        self.watchers.restore(values.get("observers", []))

    def return_to(self, checkpoint: Checkpoint) -> None:
        """Remember what was known at a checkpoint and nothing of what came after it."""
        values: Any = checkpoint.values
        self._given = None
        store = self.checkpoints.store
        self.uploaded, self.best_adapters = (
            AdapterTable.of(store, checkpoint.uploaded),
            AdapterTable.of(store, checkpoint.best),
        )
        self.best = {client: Best(*entry) for client, entry in values["best"].items()}
        self.rounds_trained = dict(values["rounds_trained"])
        self.rounds_asked = dict(values.get("rounds_asked", {}))
        self.came = {each["client_id"]: each["round"] for each in values.get(NEWCOMERS, [])}
        self.ever_moved, self.warned = values["ever_moved"], values["warned"]
        self.latest = {client: TokenLoss(*loss) for client, loss in values["latest"].items()}
        self.base_losses = {
            client: TokenLoss(*loss) for client, loss in values["base_losses"].items()
        }
        self.measured.restore(values.get("measured", {}))
        if self.shows_few:
            self.shown.restore(values.get("shown", {}))
        self.latest_round, self.round_done = values["latest_round"], checkpoint.round
        self._note_losses()
        self.graph_json = checkpoint.graph_json
        place = "graph.json of the checkpoint"
        self.graph = graph_of(self.graph_json, place) if self.graph_json else None

    def on_round(self, outcome: RoundOutcome) -> bool:
        """Write down a round; called by the loop.

        Returns:
            Whether an observer wants the run to stop here.
        """
        number, state = outcome.round, outcome.combined.state
        self._number = number
        self._given = None  # clients choose between what they sent last and what came of it
        sent = {reply.client_id: reply.payload.tensors["adapter"] for reply in outcome.replies}
        self.uploaded = self.uploaded.replaced(sent)
        for client in sent:
            self.rounds_trained[client] = self.rounds_trained.get(client, 0) + 1
        if self.config.privacy.kind != "none":
            for request in outcome.requests:
                client = request.client_id
                self.rounds_asked[client] = self.rounds_asked.get(client, 0) + 1
        events = [
            *train_events(outcome, {client: self.uploaded.digest_of(client) for client in sent}),
            *align_events(
                outcome, lambda client: digest(self.algorithm.adapter_for(state, client))
            ),
            *self._note_pulls(outcome),
            *(failure_event(failure) for failure in outcome.failures),
            *({"event": "warning", "round": number, "message": note} for note in outcome.notes),
        ]
        self._tell_clients(outcome)
        begun = time.perf_counter()
        every = self.config.evaluation.every
        if outcome.replies and (
            number in (self.config.rounds.count, self.until) or (every and number % every == 0)
        ):
            events += self._evaluate(number, state)
            evaluated = time.perf_counter() - begun
        else:
            evaluated = 0.0
        events.append(round_event(outcome))
        self.folder.append_events(events)
        if not outcome.replies:
            return False
        row = round_row(outcome, list(self.latest.values()) if evaluated else [], evaluated)
        self.folder.append_round(row)
        self._note_graph(outcome)
        self._checkpoint(number, state)
        figures = {name: value if _is_number(value) else None for name, value in row.items()}
        self.watchers.tell(RoundEvent(self.facts, number, figures))  # type: ignore[arg-type]
        return self.watchers.stop is not None

    def _tell_clients(self, outcome: RoundOutcome) -> None:
        """Tell the observers of each answer, in the order of client ids."""
        number, events = outcome.round, list[ClientEvent]()
        for reply in outcome.replies:
            events.append(ClientEvent(self.facts, number, reply.client_id, dict(reply.metrics)))
        for failure in outcome.failures:
            events.append(ClientEvent(self.facts, number, failure.client_id, {}, failure.reason))
        for event in sorted(events, key=lambda event: event.client):
            self.watchers.tell(event)

    def _tell_measuring(self, measuring: Measuring) -> None:
        """Tell the observers how far a measurement is."""
        self.watchers.tell(MeasuringEvent(run=self.facts, **asdict(measuring)))

    def _note_warning(self, message: str) -> None:
        """Write a sentence on an observer that failed into events.jsonl."""
        self.warn(self._number, [message])

    def note_nobody_related(self) -> None:
        """Say that the learned graph joined nobody; that is a finding and no failure."""
        message = (
            f"no client was pulled in {self._number} rounds: the updates of no two clients point "
            "the same way by more than their noise, so no adapter was aligned with another"
        )
        self._note_warning(message)
        _log.warning("%s", message)

    def _note_pulls(self, outcome: RoundOutcome) -> list[EventLine]:
        """Remember whether anybody was moved.

        A warning, once, where the pulls are close to nothing.
        """
        figures = outcome.combined.diagnostics.clients
        pulls = [
            of_client["relative_pull"]
            for of_client in figures.values()
            if of_client.get("relative_pull", 0.0) > 0
        ]
        self.ever_moved = self.ever_moved or bool(pulls)
        if not pulls or max(pulls) >= _SMALL_PULL or self.warned:
            return []
        self.warned = True
        message = (
            f"alignment moves adapters by at most {max(pulls):.2%} of their update a round: this "
            "is close to local training"
        )
        return [{"event": "warning", "round": outcome.round, "message": message}]

    def given(self, state: ServerState) -> tuple[LazyAdapters, Mapping[ClientId, float]]:
        """The adapter that each client would be given now, and the server's pull in it.

        The pull is a share, for clients that had a choice. A choice takes passes over the
        validation rows; asked again for the same state, the answer is the one before.
        """
        if self._given is None or self._given[0] is not state:
            self._given = (state, *self._chosen(state))
        return self._given[1:]

    def aligned(self, state: ServerState) -> LazyAdapters:
        """Each client's adapter with all of the server's pull, without asking for any choice."""
        return LazyAdapters(
            list(self.clients.parties),
            partial(self.algorithm.adapter_for, state),
            cache(partial(self._hash_of, _unread(state))),
        )

    def _hash_of(self, state: ServerState, client: ClientId) -> str:
        return content_hash(self.algorithm.adapter_for(state, client))

    def _chosen(self, state: ServerState) -> tuple[LazyAdapters, Mapping[ClientId, float]]:
        """What `given` returns, from passes over the validation rows."""
        aligned, clients = self.aligned(state), list(self.clients.parties)
        if not self.algorithm.may_decline:
            return aligned, {}

        def candidates(client: ClientId) -> Mapping[float, Adapter]:
            whole = aligned[client]
            return {1.0: whole, **self.algorithm.alternatives(self.uploaded[client], whole)}

        # Who has sent nothing yet has one adapter, which need not be read to know that.
        kept = self.clients.choose([name for name in clients if name in self.uploaded], candidates)

        def read(client: ClientId) -> Adapter:
            share = kept.get(client, 1.0)
            return aligned[client] if share == 1 else candidates(client)[share]

        def hash_of(client: ClientId) -> str:
            whole = kept.get(client, 1.0) == 1
            return str(aligned.hash_of(client)) if whole else content_hash(read(client))

        return LazyAdapters(clients, read, cache(hash_of)), kept

    def unmeasured(self, number: int) -> list[EventLine]:
        """A line for each client that could not be evaluated since this was asked last."""
        return [
            failure_event(replace(failure, round=number)) for failure in self.clients.unmeasured()
        ]

    def _evaluate(self, number: int, state: ServerState) -> list[EventLine]:
        """Test and validation loss of every client with the adapter it would be given now."""
        adapters, kept = self.given(state)
        test = self.shown.losses(adapters, "test")
        validation = self.shown.losses(adapters, "validation")
        self.latest, self.latest_round = test, number
        events: list[EventLine] = []
        improved: list[ClientId] = []
        for client in {**test, **validation}:
            tested = test.get(client)
            own = validation[client].per_token if client in validation else None
            if (
                own is not None
                and math.isfinite(own)
                and (client not in self.best or own < self.best[client].validation_loss)
            ):
                self.best[client] = Best(number, own, tested.per_token if tested else None)
                improved.append(client)
            events.append(evaluate_event(number, client, tested, own, kept.get(client)))
        self.best_adapters = self.best_adapters.replaced(
            LazyAdapters(improved, adapters.__getitem__)
        )
        self._note_losses()
        tests, validations = (
            {client: loss.per_token for client, loss in losses.items()}
            for losses in (test, validation)
        )
        self.watchers.tell(
            EvaluationEvent(
                self.facts, number, tests, validations, _mean(tests), _mean(validations)
            )
        )
        events += self.unmeasured(number)
        return events

    def _note_graph(self, outcome: RoundOutcome) -> None:
        diagnostics = outcome.combined.diagnostics
        if diagnostics.graph is None:
            return
        self.graph = diagnostics.graph
        figures = {name: value for name, value in diagnostics.round.items() if math.isfinite(value)}
        self.graph_json = graph_text(self.graph, {"round": outcome.round, **figures})
        self.folder.write_text("graph.json", self.graph_json)

    def _note_losses(self) -> None:
        """What the checkpoint says of losses.

        They change when everybody is evaluated, and not every round.
        """
        self._losses = {
            "measured": self.measured.as_json(),
            **({"shown": self.shown.as_json()} if self.shows_few else {}),
            "best": {
                client: [best.round, best.validation_loss, best.test_loss]
                for client, best in self.best.items()
            },
            "latest": {client: [loss.total, loss.tokens] for client, loss in self.latest.items()},
            "base_losses": {
                client: [loss.total, loss.tokens] for client, loss in self.base_losses.items()
            },
        }

    def _checkpoint(self, number: int, state: ServerState) -> None:
        values = {
            **self._losses,
            "latest_round": self.latest_round,
            "rounds_trained": self.rounds_trained,
            "ever_moved": self.ever_moved,
            "warned": self.warned,
            "wall_seconds": self.wall_seconds,
            "sizes": self.folder.sizes(),
        }
        if self.rounds_asked:
            values["rounds_asked"] = self.rounds_asked
        if self.came:
            parties = self.clients.parties
            values[NEWCOMERS] = [
                {"round": first, **asdict(parties[client])} for client, first in self.came.items()
            ]
        if states := self.watchers.states():
            values["observers"] = states
        self.checkpoints.save(
            Checkpoint(
                round=number,
                state=state,
                memories=self.clients.memories,
                uploaded=self.uploaded,
                best=self.best_adapters,
                values=values,
                graph_json=self.graph_json,
                beginnings=self.folder.beginnings(),
            )
        )
        self.round_done = number


def _mean(losses: Mapping[ClientId, float]) -> float | None:
    return sum(losses.values()) / len(losses) if losses else None


def _unread(state: ServerState) -> ServerState:
    """The same state; adapters that lie on disk are read where a tensor is asked for."""
    adapters = state.adapters
    return (
        replace(state, adapters=adapters.unread()) if isinstance(adapters, AdapterTable) else state
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
