"""The default engine: the whole cohort of a round trains in this process, on one resident base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedmira.clients.cohort import Cohort
from fedmira.messages import (
    ClientId,
    Failure,
    Payload,
    Reply,
    Request,
    Traffic,
    Volume,
)
from fedmira.storage import remembered
from fedmira.wire import (
    Line,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
    joined,
    separated,
)

__all__ = ["InProcessEngine"]

_OWN, _SERVER, _CLIENT = "own", "server", "client"


class InProcessEngine:
    """Trains at most `cohort_size` clients side by side.

    More are taken in turns, with equal results.

    Memories stay where `restore` put them: a `MemoryTable` keeps those of clients that do not train
    on disk.

    Args:
        cohort: the clients and their base.
        cohort_size: bounds the memory for stacked adapters and moments.
        wire: "float32" hands payloads over as they are. "float16" and "int8" write and read every
            message as machines apart would, so that a run shows what compression costs; the
            clients' memories then also hold both ends of their lines.
    """

    def __init__(self, cohort: Cohort, cohort_size: int = 64, wire: str = "float32") -> None:
        self._cohort = cohort
        self._cohort_size = cohort_size
        self._wire = wire
        self._memories: Mapping[ClientId, Payload] = {}

    @property
    def memories(self) -> Mapping[ClientId, Payload]:
        """The clients' private memories as they are now.

        Later rounds do not change what was handed out.
        """
        return self._memories

    def restore(self, memories: Mapping[ClientId, Payload]) -> None:
        """Take these memories, and keep later ones in a mapping of the same kind."""
        self._memories = memories

    def exchange(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """Train the requested clients and store what they keep for themselves."""
        answers: list[Reply | Failure] = []
        for start in range(0, len(requests), self._cohort_size):
            part = requests[start : start + self._cohort_size]
            before = {
                request.client_id: self._memories[request.client_id]
                for request in part
                if request.client_id in self._memories
            }
            worked = (
                self._cohort.work(part, before)
                if self._wire == "float32"
                else self._work_over_wire(part, before)
            )
            after: dict[ClientId, Payload] = {}
            for request, (answer, memory) in zip(part, worked, strict=True):
                if memory is not None and memory is not before.get(request.client_id):
                    after[request.client_id] = memory
                answers.append(answer)
            self._memories = remembered(self._memories, after)
        return answers

    def _work_over_wire(
        self, requests: Sequence[Request], before: Mapping[ClientId, Payload]
    ) -> list[tuple[Reply | Failure, Payload | None]]:
        """As `Cohort.work`, through messages.

        A client that fails keeps its memory and both ends of its line.
        """
        deliveries = [
            _delivered(request, self._wire, before.get(request.client_id)) for request in requests
        ]
        own = {
            client: memory
            for client, payload in before.items()
            if (memory := separated(payload, _OWN)) is not None
        }
        worked = self._cohort.work([delivery.request for delivery in deliveries], own)
        return [
            _answered(request, delivery, answer, memory, self._wire, before.get(request.client_id))
            for request, delivery, (answer, memory) in zip(
                requests, deliveries, worked, strict=True
            )
        ]


@dataclass(frozen=True, slots=True)
class _Delivery:
    """A request as it reached its client, the lines of both ends after it, and what it took."""

    request: Request
    server: Line
    client: Line
    volume: Volume


def _delivered(request: Request, wire: str, memory: Payload | None) -> _Delivery:
    server, client = Line.of(separated(memory, _SERVER)), Line.of(separated(memory, _CLIENT))
    message, server_after = encode_request(request, wire, server, "")
    # Both ends hold the same reference, so it is stored once.
    received, client_after = decode_request(message, replace(client, reference=server.reference))
    return _Delivery(received, server_after, client_after, message.volume)


def _answered(
    request: Request,
    delivery: _Delivery,
    answer: Reply | Failure,
    memory: Payload | None,
    wire: str,
    before: Payload | None,
) -> tuple[Reply | Failure, Payload | None]:
    """The answer as it reached the server, and all that is to be remembered of the client."""
    message, client = encode_answer(answer, wire, delivery.client)
    received, server = decode_answer(request, message, delivery.server)
    received = replace(received, traffic=Traffic(delivery.volume, message.volume))
    if isinstance(received, Failure):
        return received, before
    return received, joined(
        {
            _OWN: memory,
            _SERVER: server.as_payload(),
            _CLIENT: replace(client, reference={}).as_payload(),
        }
    )
