"""The work of a round's clients.

Begin, choose a start, local training on one resident base, finish.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedmira.adapters import Adapter, same_shapes
from fedmira.config import LocalSettings
from fedmira.data import ClientData
from fedmira.messages import (
    ClientId,
    Failure,
    Payload,
    Reply,
    Request,
)
from fedmira.methods import Method, Start, Trained
from fedmira.model import (
    AdapterKind,
    Contender,
    LocalOutcome,
    LocalTask,
    RowPrivacy,
    count_steps,
    rate_shares,
)
from fedmira.wire import WITHHELD, checked_reply

__all__ = ["Cohort", "CohortSettings"]

_FIRST, _SECOND, _STEPS = "optimizer.first", "optimizer.second", "optimizer.steps"


@dataclass(frozen=True, slots=True)
class CohortSettings:
    """How clients train: [local], each client's scale, and the most tokens in one forward pass.

    Attributes:
        local: the settings of [local].
        scales: client id -> s = alpha / r of its adapter.
        token_budget: most token positions in one forward pass.
        rounds: of the run, over which the learning rate goes.
        privacy: client id -> how it hides its rows; empty where rows are not hidden.
    """

    local: LocalSettings
    scales: Mapping[ClientId, float]
    token_budget: int
    rounds: int = 1
    privacy: Mapping[ClientId, RowPrivacy] = field(default_factory=dict)

    def of(self, clients: Sequence[ClientId]) -> CohortSettings:
        """The same for a few of the clients.

        Args:
            clients: those whose settings are needed.
        """
        return replace(
            self,
            scales={client: self.scales[client] for client in clients},
            privacy={name: self.privacy[name] for name in clients if name in self.privacy},
        )


@dataclass(frozen=True, slots=True)
class _Measured:
    """What a client's validation rows were asked before training.

    Attributes:
        tokens: token positions computed.
        pull_kept: share of the server's change that the client keeps; None where it had no choice.
        losses: of the adapters that were compared.
    """

    tokens: int
    pull_kept: float | None
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Cohort:
    """Clients that share one resident base model.

    Attributes:
        algorithm: the method, whose client half is called.
        kind: the adapters, on their base.
        clients: client id -> its rows.
        settings: how they train.
    """

    algorithm: Method
    kind: AdapterKind
    clients: Mapping[ClientId, ClientData]
    settings: CohortSettings

    def work(
        self, requests: Sequence[Request], memories: Mapping[ClientId, Payload]
    ) -> list[tuple[Reply | Failure, Payload | None]]:
        """Train the requested clients together.

        Args:
            requests: of one round, one for each client that trains.
            memories: each client's private memory, where it has one.

        Returns:
            Per request a reply or a failure, with the client's memory afterwards (unchanged after a
            failure).
        """
        begun = [
            self.algorithm.started(request.payload, memories.get(request.client_id))
            for request in requests
        ]
        starts, choices = self._chosen(requests, begun)
        tasks = [
            self._task(request, start, memories.get(request.client_id))
            for request, start in zip(requests, starts, strict=True)
        ]
        outcomes = self.kind.train(tasks, self.settings.local, self.settings.token_budget)
        return [
            self._finish(request, outcome, memories.get(request.client_id), measured, start)
            for request, outcome, measured, start in zip(
                requests, outcomes, choices, starts, strict=True
            )
        ]

    def _chosen(
        self, requests: Sequence[Request], starts: Sequence[Start]
    ) -> tuple[list[Start], list[_Measured]]:
        """Each client's start with the adapter that its own validation rows choose or blend.

        Beside it stands what was measured.
        """
        shares = [(1.0, *start.alternatives) for start in starts]
        contenders = [
            Contender(
                [
                    start.adapter,
                    *start.alternatives.values(),
                    *(start.blend.candidates if start.blend else ()),
                ],
                self.settings.scales[request.client_id],
                self.clients[request.client_id].validation,
            )
            for request, start in zip(requests, starts, strict=True)
        ]
        choices = self.kind.choose(contenders, self.settings.token_budget)
        adapters = [
            _blended(start, choice.losses) if start.blend else contender.adapters[choice.index]
            for start, contender, choice in zip(starts, contenders, choices, strict=True)
        ]
        measured = [
            _Measured(choice.tokens, share[choice.index] if len(share) > 1 else None, choice.losses)
            for share, choice in zip(shares, choices, strict=True)
        ]
        return [
            replace(start, adapter=adapter, alternatives={}, blend=None)
            for adapter, start in zip(adapters, starts, strict=True)
        ], measured

    def _task(self, request: Request, start: Start, memory: Payload | None) -> LocalTask:
        client = request.client_id
        moments = None
        if (
            memory is not None
            and _FIRST in memory.tensors
            and same_shapes(memory.tensors[_FIRST], start.adapter)
        ):
            moments = (memory.tensors[_FIRST], memory.tensors[_SECOND], int(memory.scalars[_STEPS]))
        rows, local = self.clients[client].train, self.settings.local
        return LocalTask(
            start=start.adapter,
            scale=self.settings.scales[client],
            rows=rows,
            seed=request.seed,
            hook=start.hook,
            settle=start.settle,
            squares=start.squares,
            moments=moments,
            advantages=(
                [row.advantage or 0.0 for row in rows] if local.advantage_temperature else None
            ),
            rates=rate_shares(
                local, request.round, self.settings.rounds, count_steps(len(rows), local)
            ),
            privacy=self.settings.privacy.get(client),
        )

    def _finish(
        self,
        request: Request,
        outcome: LocalOutcome,
        memory: Payload | None,
        measured: _Measured,
        start: Start,
    ) -> tuple[Reply | Failure, Payload | None]:
        client, round_number = request.client_id, request.round
        if outcome.failure:
            return Failure(client, round_number, "train", outcome.failure), memory
        rows = len(self.clients[client].train)
        trained = Trained(
            adapter=outcome.adapter,
            num_examples=rows,
            num_steps=outcome.num_steps,
            learning_rate=self.settings.local.learning_rate,
            movement=outcome.movement,
            losses=measured.losses,
            squares=outcome.squares,
            learned=start.learned() if start.learned else {},
        )
        payload, kept = self.algorithm.finished(request.payload, memory, trained)
        if client in self.settings.privacy:  # figures of the rows themselves stay here
            metrics = {"steps": float(outcome.num_steps), WITHHELD: 1.0}
            reply = checked_reply(request, Reply(client, round_number, rows, payload, metrics))
            return reply, _with_moments(kept, outcome) if isinstance(reply, Reply) else memory
        metrics = {
            "loss": outcome.loss,
            "first_loss": outcome.first_loss,
            "last_loss": outcome.last_loss,
            "steps": float(outcome.num_steps),
            "response_tokens": float(outcome.response_tokens),
            "tokens": float(outcome.tokens + measured.tokens),
        }
        if measured.pull_kept is not None:
            metrics["pull_kept"] = measured.pull_kept
        if outcome.clip_share is not None:
            metrics["clip_share"] = outcome.clip_share
        reply = checked_reply(request, Reply(client, round_number, rows, payload, metrics))
        return reply, _with_moments(kept, outcome) if isinstance(reply, Reply) else memory


def _blended(start: Start, losses: Sequence[float]) -> Adapter:
    """The start's adapter as its blend makes it.

    As it is where the client has no validation rows or there are no candidates.
    """
    return start.blend.into(losses) if start.blend and losses else start.adapter


def _with_moments(memory: Payload | None, outcome: LocalOutcome) -> Payload | None:
    if outcome.moments is None:
        return memory
    first, second, steps = outcome.moments
    tensors = dict(memory.tensors) if memory else {}
    scalars = dict(memory.scalars) if memory else {}
    return Payload({**tensors, _FIRST: first, _SECOND: second}, {**scalars, _STEPS: float(steps)})
