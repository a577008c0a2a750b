"""The default engine: the whole cohort of a round trains in this process, on one resident base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedmira.clients import Cohort
from fedmira.engines.memories import remembered
from fedmira.messages import ClientId, Failure, Payload, Reply, Request

__all__ = ["InProcessEngine"]


class InProcessEngine:
    """Trains at most `cohort_size` clients side by side; more are taken in turns, with equal results.

    Memories stay where `restore` put them: a `MemoryTable` keeps those of clients that do not train on disk.

    Args:
        cohort: the clients and their base.
        cohort_size: bounds the memory for stacked adapters and moments.
    """

    def __init__(self, cohort: Cohort, cohort_size: int = 64) -> None:
        self._cohort = cohort
        self._cohort_size = cohort_size
        self._memories: Mapping[ClientId, Payload] = {}

    @property
    def memories(self) -> Mapping[ClientId, Payload]:
        """The clients' private memories as they are now; later rounds do not change what was handed out."""
        return self._memories

    def restore(self, memories: Mapping[ClientId, Payload]) -> None:
        """Take these memories, and keep later ones in a mapping of the same kind."""
        self._memories = memories

    def exchange(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """Train the requested clients and store what they keep for themselves."""
        answers: list[Reply | Failure] = []
        for start in range(0, len(requests), self._cohort_size):
            part = requests[start : start + self._cohort_size]
            before = {request.client_id: self._memories[request.client_id] for request in part if request.client_id in self._memories}
            after: dict[ClientId, Payload] = {}
            for request, (answer, memory) in zip(part, self._cohort.work(part, before), strict=True):
                if memory is not None and memory is not before.get(request.client_id):
                    after[request.client_id] = memory
                answers.append(answer)
            self._memories = remembered(self._memories, after)
        return answers
