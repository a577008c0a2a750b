"""Any clients, asked through messages: what is sent is written and read as machines apart would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedmira.adapters import Adapter
from fedmira.clients.base import Candidates, Clients, SplitName
from fedmira.data import ClientSummary
from fedmira.messages import ClientId, Failure, Payload, Reply, Request, Traffic, Volume
from fedmira.metrics import TokenLoss
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

__all__ = ["OverWire"]

_OWN, _SERVER, _CLIENT = "own", "server", "client"


class OverWire:
    """Clients behind a wire, so that a run in one process shows what compression costs.

    Only training goes through messages, as only there adapters travel in both directions. The
    memories hold, beside what each client keeps, both ends of its line.

    Args:
        inner: who does the work.
        wire: "float16" or "int8".
        at_once: clients whose messages are in memory together.
    """

    def __init__(self, inner: Clients, wire: str, at_once: int = 64) -> None:
        self.inner = inner
        self._wire = wire
        self._at_once = at_once
        self._memories: Mapping[ClientId, Payload] = {}

    @property
    def method(self) -> object | None:
        """That of the clients."""
        return self.inner.method

    @property
    def parties(self) -> Mapping[ClientId, ClientSummary]:
        """What each client says of itself."""
        return self.inner.parties

    @property
    def memories(self) -> Mapping[ClientId, Payload]:
        """Each client's own memory and both ends of its line."""
        return self._memories

    def restore(self, memories: Mapping[ClientId, Payload]) -> None:
        """Takes these memories, and keeps later ones in a mapping of the same kind."""
        self._memories = memories

    def unmeasured(self) -> list[Failure]:
        """As the clients say."""
        return self.inner.unmeasured()

    def train(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """Has the clients train on what reached them; who fails keeps its memory and its line."""
        answers: list[Reply | Failure] = []
        for start in range(0, len(requests), self._at_once):
            answers += self._train(requests[start : start + self._at_once])
        return answers

    def losses(
        self, adapters: Mapping[ClientId, Adapter], split: SplitName = "test"
    ) -> dict[ClientId, TokenLoss]:
        """As the clients measure them."""
        return self.inner.losses(adapters, split)

    def choose(self, clients: Sequence[ClientId], candidates: Candidates) -> dict[ClientId, float]:
        """As the clients choose."""
        return self.inner.choose(clients, candidates)

    def score(
        self, adapters: Mapping[ClientId, Adapter], max_new_tokens: int
    ) -> dict[ClientId, dict[str, float]]:
        """As the clients answer."""
        return self.inner.score(adapters, max_new_tokens)

    def _train(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        known = {
            request.client_id: self._memories[request.client_id]
            for request in requests
            if request.client_id in self._memories
        }
        deliveries = {
            request.client_id: _delivered(request, self._wire, known.get(request.client_id))
            for request in requests
        }
        own = {client: separated(memory, _OWN) for client, memory in known.items()}
        self.inner.restore({client: memory for client, memory in own.items() if memory is not None})
        given = self.inner.train([delivery.request for delivery in deliveries.values()])
        by_client = {answer.client_id: answer for answer in given}
        answers: list[Reply | Failure] = []
        changes: dict[ClientId, Payload] = {}
        for request in requests:
            client = request.client_id
            answer, lines = _answered(request, deliveries[client], by_client[client], self._wire)
            if lines is not None:
                changes[client] = joined({_OWN: self.inner.memories.get(client), **lines})
            answers.append(answer)
        self._memories = remembered(self._memories, changes)
        return answers


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
    request: Request, delivery: _Delivery, answer: Reply | Failure, wire: str
) -> tuple[Reply | Failure, dict[str, Payload] | None]:
    """The answer as it reached the server, and both ends of the line after it.

    None after a failure.
    """
    message, client = encode_answer(answer, wire, delivery.client)
    received, server = decode_answer(request, message, delivery.server)
    received = replace(received, traffic=Traffic(delivery.volume, message.volume))
    if isinstance(received, Failure):
        return received, None
    lines = {_SERVER: server.as_payload(), _CLIENT: replace(client, reference={}).as_payload()}
    return received, lines
