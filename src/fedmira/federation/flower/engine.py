"""The engine whose clients are on machines of their own: a round's requests over Flower's grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedmira.federation.ends import ServerEnd
from fedmira.federation.flower.nodes import Nodes, Problem
from fedmira.messages import (
    ClientId,
    Failure,
    Payload,
    Reply,
    Request,
)
from fedmira.wire import TRAIN

__all__ = ["FlowerEngine"]


class FlowerEngine:
    """Sends each client's node its own request; nodes keep their private memories themselves.

    Args:
        nodes: of the federation.
        end: this end of the lines to the clients.
        min_replies: before a round of which fewer nodes are connected, it waits for them.
        wait_s: how long.
    """

    def __init__(self, nodes: Nodes, end: ServerEnd, min_replies: int, wait_s: float) -> None:
        self._nodes = nodes
        self._end = end
        self._min_replies = min_replies
        self._wait_s = wait_s

    @property
    def memories(self) -> Mapping[ClientId, Payload]:
        """What this end remembers of each client's line.

        Of the clients' own memories it knows nothing.
        """
        return self._end.memories

    def restore(self, memories: Mapping[ClientId, Payload]) -> None:
        """Take these, empty or from a checkpoint."""
        self._end.restore(memories)

    def exchange(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """One reply or failure per request.

        A node that is not there, late, or answers nonsense is a failure.
        """
        chosen = [request.client_id for request in requests]
        self._nodes.gather(chosen, min(self._min_replies, len(chosen)), self._wait_s)
        messages = {request.client_id: self._end.send(request) for request in requests}
        answers = self._nodes.ask(TRAIN, messages, str(requests[0].round))
        return [
            self._end.lost(request, answer.stage, answer.reason)
            if isinstance(answer, Problem)
            else self._end.receive(request, answer)
            for request in requests
            for answer in (answers[request.client_id],)
        ]
