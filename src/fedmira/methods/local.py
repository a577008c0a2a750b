"""Every client alone: w_k <- its own trained adapter.

This is the baseline that any federation must beat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from fedmira.adapters import Adapter, replaced
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import Combined, Method, ServerState

__all__ = ["Local"]


class Local(Method):
    """The server only keeps each client's adapter between rounds."""

    name: ClassVar[str] = "local"
    title: ClassVar[str] = "local training"
    takes_newcomers: ClassVar[bool] = True
    uses_graph: ClassVar[bool] = False

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The state holds each client's own adapter, at first its start."""
        return ServerState(adapters=dict(starts))

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """The client's own adapter."""
        return Payload({"adapter": state.adapters[client]})

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Keep what each client trained."""
        trained = {reply.client_id: reply.payload.tensors["adapter"] for reply in replies}
        return Combined(
            ServerState(adapters=replaced(state.adapters, trained), numbers=state.numbers)
        )

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """The client's own adapter."""
        return state.adapters[client]
