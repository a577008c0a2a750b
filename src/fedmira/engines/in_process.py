"""The default engine: the whole cohort of a round trains in this process, on one resident base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedmira.clients import Cohort
from fedmira.messages import ClientId, Failure, Payload, Reply, Request

__all__ = ["InProcessEngine"]


class InProcessEngine:
    """Trains at most `cohort_size` clients side by side; more are taken in turns, with equal results.

    Args:
        cohort: the clients and their base.
        cohort_size: bounds the memory for stacked adapters and moments.
    """

    def __init__(self, cohort: Cohort, cohort_size: int = 64) -> None:
        self._cohort = cohort
        self._cohort_size = cohort_size
        self._memories: dict[ClientId, Payload] = {}

    @property
    def memories(self) -> Mapping[ClientId, Payload]:
        """The clients' private memories."""
        return dict(self._memories)

    def restore(self, memories: Mapping[ClientId, Payload]) -> None:
        """Put memories from a checkpoint back."""
        self._memories = dict(memories)

    def exchange(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """Train the requested clients and store what they keep for themselves."""
        answers: list[Reply | Failure] = []
        for start in range(0, len(requests), self._cohort_size):
            part = requests[start : start + self._cohort_size]
            for request, (answer, memory) in zip(part, self._cohort.work(part, self._memories), strict=True):
                if memory is not None:
                    self._memories[request.client_id] = memory
                answers.append(answer)
        return answers
