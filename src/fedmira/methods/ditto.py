"""A personal adapter for every client, trained beside a shared one and pulled towards it.

Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization", arXiv
2012.04221. With w the shared adapter, which FedAvg trains, and v_k the personal one, which starts
at the common start:

    v_k  <-  v_k - step (grad f_k(v_k) + lambda (v_k - w))

The paper trains both in every round, which is twice the work of the other methods. Here a client's
rounds take turns, the first for w, the second for v_k, and so on: a client takes as many local
steps a round as under any other method, half of them on each adapter. For the paper's work, double
the rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from fedmira.adapters import Adapter, replaced
from fedmira.config.methods import Need
from fedmira.config.section import setting
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import (
    Combined,
    Method,
    ServerState,
    Start,
    Trained,
)
from fedmira.methods.parts.averaging import COMMON, mean_of
from fedmira.methods.parts.partly_sent import PartlySent
from fedmira.methods.parts.proximal import toward

__all__ = ["Ditto"]

TURNS = "turns"


class Ditto(Method):
    """The state holds the shared adapter and every client's personal one.

    The number "turns", int64 [K], counts the rounds of each client.

    The personal adapters stay with their clients: they are no part of the bytes that are counted.
    """

    name: ClassVar[str] = "ditto"
    title: ClassVar[str] = "Ditto"
    takes_newcomers: ClassVar[bool] = True
    searched: ClassVar[Mapping[str, tuple[Any, ...]]] = {"personal_pull": (0.01, 0.1, 1.0)}
    uses_graph: ClassVar[bool] = False
    averages: ClassVar[bool] = True
    partly_sent: ClassVar[bool] = True
    always_needs: ClassVar[Mapping[Need, str]] = {
        Need.ONE_RANK: "",
        Need.FRESH_MOMENTS: (
            "algorithm.name = 'ditto': the rounds of a client take turns between two adapters, and "
            "the moments of one do not belong to the other; set local.optimizer_state = 'fresh'"
        ),
    }
    personal_pull: float = setting(
        0.1, ge=0, help="lambda, the pull of a personal adapter towards the shared one"
    )

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The common start for everything."""
        turns = torch.zeros(len(self.context.clients), dtype=torch.int64)
        return ServerState({COMMON: next(iter(starts.values())), **starts}, {TURNS: turns})

    def joined(
        self,
        state: ServerState,
        starts: Mapping[ClientId, Adapter],
        newcomers: Sequence[ClientId],
    ) -> ServerState:
        """A newcomer's personal adapter begins at the shared one, to which it is pulled."""
        grown, shared = super().joined(state, starts, newcomers), state.adapters[COMMON]
        own = replaced(grown.adapters, dict.fromkeys(newcomers, shared))
        return ServerState(own, grown.numbers)

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """The shared adapter: to be trained, or to be pulled towards."""
        shared = state.adapters[COMMON]
        if not self._personal_turn(state, client):
            return Payload({"adapter": shared})
        return PartlySent(
            {"adapter": state.adapters[client], "shared": shared}, sent={"shared": shared}
        )

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Average the shared adapters that came back by training rows; keep the personal ones."""
        trained = {reply.client_id: reply.payload.tensors["adapter"] for reply in replies}
        changes = {
            client: adapter
            for client, adapter in trained.items()
            if self._personal_turn(state, client)
        }
        shared = [reply for reply in replies if reply.client_id not in changes]
        if shared:
            changes[COMMON] = mean_of(shared, self.context.server)
        turns = state.numbers[TURNS].clone()
        turns[[self.context.clients.index(client) for client in trained]] += 1
        return Combined(
            ServerState(replaced(state.adapters, changes), {**state.numbers, TURNS: turns})
        )

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """The client's personal adapter, which is its result."""
        return state.adapters[client]

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Start from the adapter whose turn it is.

        The personal one is pulled towards the shared one.
        """
        shared = payload.tensors.get("shared")
        return Start(
            payload.tensors["adapter"],
            None if shared is None else toward(shared, self.personal_pull),
        )

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send the shared adapter; of a personal one nothing travels."""
        tensors = {"adapter": trained.adapter}
        return PartlySent(tensors, sent={} if "shared" in payload.tensors else tensors), None

    def _personal_turn(self, state: ServerState, client: ClientId) -> bool:
        """Whether this client's next round is for its personal adapter."""
        return int(state.numbers[TURNS][self.context.clients.index(client)]) % 2 == 1
