"""One shared adapter whose factors take turns: a round trains and averages B, the next one A.

Chen et al. 2025, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA"
(RoLoRA), NeurIPS 2025, arXiv 2502.01755. Over the clients of the round,

    odd rounds:    B  <-  sum_k n_k / n  B_k         A frozen
    even rounds:   A  <-  sum_k n_k / n  A_k         B frozen

The frozen factor is the same for all, so the mean of the factors has the mean of the products. B is
first: as long as it is zero, A has no gradient. A round without any usable reply is no turn.

Up travels the factor that was trained; down what has changed since the client's last round, which
is one factor for a client of the last round, and else both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch

from fedmira.adapters import Adapter, replaced, weighted_sum
from fedmira.adapters.low_rank import DOWN, UP
from fedmira.config.methods import Need
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import Combined, Method, ServerState, Start, Trained
from fedmira.methods.parts.averaging import COMMON, by_rows
from fedmira.methods.parts.partly_sent import PartlySent

__all__ = ["RoLora"]

TURN, SEEN, TRAINS_A = "turn", "seen", "trains_a"
_NEVER = -1


class RoLora(Method):
    """The state holds the one adapter.

    Its numbers are "turn" (int64 [1], how often a factor was averaged) and "seen" (int64 [K], the
    turn for which a client was last sent the adapter, -1 where it never was).
    """

    name: ClassVar[str] = "rolora"
    title: ClassVar[str] = "RoLoRA"
    takes_newcomers: ClassVar[bool] = True
    uses_graph: ClassVar[bool] = False
    partly_sent: ClassVar[bool] = True
    always_needs: ClassVar[Mapping[Need, str]] = {
        Need.ONE_RANK: "",
        Need.FACTORS: "",
        Need.FRESH_MOMENTS: (
            "algorithm.name = 'rolora': rounds take turns between the factors, and kept moments "
            "would move the one that is frozen; set local.optimizer_state = 'fresh'"
        ),
    }

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The start that all clients have in common, and nobody has seen anything."""
        seen = torch.full((len(self.context.clients),), _NEVER, dtype=torch.int64)
        return ServerState(
            {COMMON: next(iter(starts.values()))},
            {TURN: torch.zeros(1, dtype=torch.int64), SEEN: seen},
        )

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """The adapter, of which the factors travel that have changed since the client had it."""
        shared, turn = state.adapters[COMMON], int(state.numbers[TURN])
        seen = int(state.numbers[SEEN][self.context.clients.index(client)])
        changed = _factor(shared, _suffix(seen)) if 0 <= seen == turn - 1 else shared
        trains_a = {TRAINS_A: float(_suffix(turn) == DOWN)}
        return PartlySent({"adapter": shared}, trains_a, sent={"changed": changed})

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Average the factor whose turn it is by training rows; the other one stays."""
        turn = int(state.numbers[TURN])
        ordered, weights = by_rows(replies)
        parts = [_factor(reply.payload.tensors["adapter"], _suffix(turn)) for reply in ordered]
        shared = {**state.adapters[COMMON], **weighted_sum(parts, weights)}
        seen = state.numbers[SEEN].clone()
        seen[[self.context.clients.index(reply.client_id) for reply in ordered]] = turn
        numbers = {**state.numbers, TURN: state.numbers[TURN] + 1, SEEN: seen}
        return Combined(ServerState(replaced(state.adapters, {COMMON: shared}), numbers))

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """The shared adapter, whoever the client is."""
        return state.adapters[COMMON]

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Start from the shared adapter; the factor whose turn it is not gets no gradient."""
        return Start(payload.tensors["adapter"], partial(_still, _frozen(payload)))

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send the trained factor.

        The frozen one is what it was, whatever weight decay did to it meanwhile.
        """
        before = _factor(payload.tensors["adapter"], _frozen(payload))
        adapter = {**trained.adapter, **before}
        sent = {name: tensor for name, tensor in adapter.items() if name not in before}
        return PartlySent({"adapter": adapter}, sent={"trained": sent}), None


def _suffix(turn: int) -> str:
    """How the names of the factor end that is trained in this turn, from 0."""
    return DOWN if turn % 2 else UP


def _frozen(payload: Payload) -> str:
    """How the names of the factor end that is frozen in the round of this payload."""
    return UP if payload.scalars[TRAINS_A] else DOWN


def _factor(adapter: Adapter, suffix: str) -> Adapter:
    """One factor of every layer, in the order of the adapter."""
    return {name: tensor for name, tensor in adapter.items() if name.endswith(suffix)}


def _still(suffix: str, gradient: Adapter, parameters: Adapter) -> Adapter:
    """A gradient hook: zeros for the factor whose names end so."""
    frozen = _factor(gradient, suffix)
    return {**gradient, **{name: torch.zeros_like(part) for name, part in frozen.items()}}
