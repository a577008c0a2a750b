"""One shared adapter, averaged by training rows.

Theta <- sum_k n_k / n theta_k over the clients of the round.

McMahan et al. 2017; over LoRA factors, A and B apart, it is FedIT (Zhang et al. 2023, arXiv
2305.05644).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from fedmira.adapters import Adapter, replaced
from fedmira.config.methods import Need
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import Combined, Method, ServerState
from fedmira.methods.parts.averaging import mean_of

__all__ = ["FedAvg"]

SHARED = "shared"


class FedAvg(Method):
    """The state holds one adapter, "shared", with which every client starts and is evaluated."""

    name: ClassVar[str] = "fedavg"
    title: ClassVar[str] = "FedAvg"
    takes_newcomers: ClassVar[bool] = True
    uses_graph: ClassVar[bool] = False
    averages: ClassVar[bool] = True
    sends_mean_alone: ClassVar[bool] = True
    always_needs: ClassVar[Mapping[Need, str]] = {Need.ONE_RANK: ""}

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The start that all clients have in common."""
        return ServerState(adapters={SHARED: next(iter(starts.values()))})

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """Send the shared adapter to every client."""
        return Payload({"adapter": state.adapters[SHARED]})

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Average the replies by their training rows."""
        return Combined(
            ServerState(
                adapters=replaced(state.adapters, {SHARED: mean_of(replies, self.context.server)}),
                numbers=state.numbers,
            )
        )

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """The shared adapter, whoever the client is."""
        return state.adapters[SHARED]
