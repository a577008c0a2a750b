"""FedAvg over factors, with what the mean of the factors misses kept in a frozen part of the adapter.

Singhal et al. 2025, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models", ACL 2025. With p_k = n_k / n, A and B the means of the clients' factors and R
the residual,

    R  <-  R + sum_k p_k B_k A_k - B A          so that B A + R is the mean of what the clients trained

The paper adds R to the base, which every client then has to hold in its own version. Here the base
stays as it is: R is the frozen part of the adapter, cut to the directions that the rank leaves for
it, the strongest first. It is exact while R fits, and the log's `truncation` says what did not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmira.adapters import (
    Adapter,
    mix,
    replaced,
    weighted_sum,
)
from fedmira.config.methods import FedExSettings
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import (
    Combined,
    Diagnostics,
    PlainClient,
    ServerState,
    Start,
    Trained,
)
from fedmira.methods.context import AlgorithmContext
from fedmira.methods.parts.averaging import COMMON, by_rows, require_one_rank
from fedmira.methods.parts.partly_sent import PartlySent
from fedmira.methods.parts.rank_split import RankSplit, check_split

__all__ = ["FedEx", "build_fedex"]


@dataclass(frozen=True, slots=True)
class FedEx(PlainClient):
    """The state holds one adapter, its first directions trained and the others the residual.

    Attributes:
        split: where the adapter is divided.
        rank, scale: of the whole adapter.
    """

    split: RankSplit
    rank: int
    scale: float

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The start that all clients have in common; with B = 0 the residual is zero."""
        return ServerState({COMMON: next(iter(starts.values()))})

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """The shared adapter with its residual."""
        return Payload({"adapter": state.adapters[COMMON]})

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Average the trained factors by training rows and add what their mean misses to the residual."""
        ordered, weights = by_rows(replies)
        parts = [self.split.trained(reply.payload.tensors["adapter"]) for reply in ordered]
        mean, residual = weighted_sum(parts, weights), self.split.frozen(state.adapters[COMMON])
        terms, shares, room = (
            [residual, *parts, mean],
            [1.0, *weights, -1.0],
            self.rank - self.split.of(self.rank),
        )
        mixed = mix(terms, shares, [self.scale] * len(terms), room, self.scale, residual)
        after = self.split.joined(mean, mixed.adapter)
        diagnostics = Diagnostics(round={"truncation": mixed.tail})
        return Combined(
            ServerState(replaced(state.adapters, {COMMON: after}), state.numbers), diagnostics
        )

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """The shared adapter with its residual."""
        return state.adapters[COMMON]

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Start from the shared adapter; the residual gets no gradient."""
        return Start(payload.tensors["adapter"], self.split.still)

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send the trained part; the residual is what it was, whatever weight decay did to it meanwhile."""
        part = self.split.trained(trained.adapter)
        return PartlySent(
            {"adapter": self.split.joined(part, self.split.frozen(payload.tensors["adapter"]))},
            sent={"trained": part},
        ), None


def build_fedex(settings: FedExSettings, context: AlgorithmContext) -> FedEx:
    """Check that one adapter fits all clients and has room for both parts.

    Raises:
        ConfigError: clients differ in rank, or a part would be empty.
    """
    require_one_rank(settings.name, context)
    first = context.clients[0]
    return FedEx(
        check_split(settings.name, settings.trained_rank, context),
        context.ranks[first],
        context.scale(first),
    )
