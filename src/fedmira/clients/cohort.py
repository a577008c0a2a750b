"""The work of a round's clients: begin, local training on one resident base, finish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmira.adapters import all_finite, same_shapes
from fedmira.algorithms import Algorithm, Start, Trained
from fedmira.config import LocalSettings
from fedmira.data import ClientData
from fedmira.messages import ClientId, Failure, Payload, Reply, Request
from fedmira.model import BaseModel, LocalOutcome, LocalTask, TargetModule, train_cohort

__all__ = ["Cohort", "CohortSettings"]

_FIRST, _SECOND, _STEPS = "optimizer.first", "optimizer.second", "optimizer.steps"


@dataclass(frozen=True, slots=True)
class CohortSettings:
    """How clients train: [local], LoRA's scale per client, dropout, and the most tokens in one forward pass."""

    local: LocalSettings
    scales: Mapping[ClientId, float]
    dropout: float
    token_budget: int


@dataclass(frozen=True)
class Cohort:
    """Clients that share one resident base model."""

    algorithm: Algorithm
    base: BaseModel
    targets: Sequence[TargetModule]
    clients: Mapping[ClientId, ClientData]
    settings: CohortSettings

    def work(self, requests: Sequence[Request], memories: Mapping[ClientId, Payload]) -> list[tuple[Reply | Failure, Payload | None]]:
        """Train the requested clients together.

        Args:
            memories: each client's private memory, where it has one.

        Returns:
            Per request a reply or a failure, with the client's memory afterwards (unchanged after a failure).
        """
        starts = [self.algorithm.begin(request.payload, memories.get(request.client_id)) for request in requests]
        tasks = [self._task(request, start, memories.get(request.client_id)) for request, start in zip(requests, starts, strict=True)]
        outcomes = train_cohort(self.base, self.targets, tasks, self.settings.local, self.settings.dropout, self.settings.token_budget)
        return [
            self._finish(request, outcome, memories.get(request.client_id)) for request, outcome in zip(requests, outcomes, strict=True)
        ]

    def _task(self, request: Request, start: Start, memory: Payload | None) -> LocalTask:
        client = request.client_id
        moments = None
        if memory is not None and _FIRST in memory.tensors and same_shapes(memory.tensors[_FIRST], start.adapter):
            moments = (memory.tensors[_FIRST], memory.tensors[_SECOND], int(memory.scalars[_STEPS]))
        return LocalTask(start.adapter, self.settings.scales[client], self.clients[client].train, request.seed, start.hook, moments)

    def _finish(self, request: Request, outcome: LocalOutcome, memory: Payload | None) -> tuple[Reply | Failure, Payload | None]:
        client, round_number = request.client_id, request.round
        if outcome.failure:
            return Failure(client, round_number, "train", outcome.failure), memory
        rows = len(self.clients[client].train)
        trained = Trained(outcome.adapter, rows, outcome.num_steps, self.settings.local.learning_rate, outcome.movement)
        payload, kept = self.algorithm.finish(request.payload, memory, trained)
        if not all(all_finite(adapter) for adapter in payload.tensors.values()):
            return Failure(client, round_number, "reply", "the reply holds non-finite numbers; the client keeps its old adapter"), memory
        metrics = {
            "loss": outcome.loss,
            "first_loss": outcome.first_loss,
            "last_loss": outcome.last_loss,
            "steps": float(outcome.num_steps),
            "response_tokens": float(outcome.response_tokens),
            "tokens": float(outcome.tokens),
        }
        if outcome.clip_share is not None:
            metrics["clip_share"] = outcome.clip_share
        return Reply(client, round_number, rows, payload, metrics), _with_moments(kept, outcome)


def _with_moments(memory: Payload | None, outcome: LocalOutcome) -> Payload | None:
    if outcome.moments is None:
        return memory
    first, second, steps = outcome.moments
    tensors = dict(memory.tensors) if memory else {}
    scalars = dict(memory.scalars) if memory else {}
    return Payload({**tensors, _FIRST: first, _SECOND: second}, {**scalars, _STEPS: float(steps)})
