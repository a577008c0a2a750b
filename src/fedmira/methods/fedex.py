"""FedAvg over factors, with what the mean of factors misses kept in a frozen part of the adapter.

Singhal et al. 2025, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models", ACL 2025. With p_k = n_k / n, A and B the means of the clients' factors and R
the residual,

    R  <-  R + sum_k p_k B_k A_k - B A      so that B A + R is the mean of what the clients trained

The paper adds R to the base, which every client then has to hold in its own version. Here the base
stays as it is: R is the frozen part of the adapter, cut to the directions that the rank leaves for
it, the strongest first. It is exact while R fits, and the log's `truncation` says what did not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from fedmira.adapters import (
    Adapter,
    mix,
    replaced,
    weighted_sum,
)
from fedmira.config.methods import Need
from fedmira.config.section import Count, setting
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import (
    Combined,
    Diagnostics,
    Method,
    ServerState,
    Start,
    Trained,
)
from fedmira.methods.parts.averaging import COMMON, by_rows
from fedmira.methods.parts.partly_sent import PartlySent
from fedmira.methods.parts.rank_split import RankSplit, check_split

__all__ = ["FedEx"]


class FedEx(Method):
    """The state holds one adapter, its first directions trained and the others the residual."""

    name: ClassVar[str] = "fedex"
    title: ClassVar[str] = "FedEx-LoRA"
    takes_newcomers: ClassVar[bool] = True
    uses_graph: ClassVar[bool] = False
    partly_sent: ClassVar[bool] = True
    always_needs: ClassVar[Mapping[Need, str]] = {Need.ONE_RANK: "", Need.FACTORS: ""}
    trained_rank: Count = setting(
        0,
        help=(
            "directions of an adapter that are trained; the remaining ones of `adapter.rank` "
            "hold the frozen part. 0 takes half"
        ),
    )

    @property
    def split(self) -> RankSplit:
        """Where the adapter is divided."""
        return RankSplit(self.trained_rank)

    def check(self) -> None:
        """Both parts of the adapter need room.

        Raises:
            ConfigError: a part would be empty.
        """
        check_split(self.name, self.trained_rank, self.context)

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The start that all clients have in common; with B = 0 the residual is zero."""
        return ServerState({COMMON: next(iter(starts.values()))})

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """The shared adapter with its residual."""
        return Payload({"adapter": state.adapters[COMMON]})

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Average the trained factors by training rows and add what they miss to the residual."""
        ordered, weights = by_rows(replies)
        parts = [self.split.trained(reply.payload.tensors["adapter"]) for reply in ordered]
        mean, residual = weighted_sum(parts, weights), self.split.frozen(state.adapters[COMMON])
        first = self.context.clients[0]
        rank, scale = self.context.ranks[first], self.context.scale(first)  # those of all clients
        terms, shares = [residual, *parts, mean], [1.0, *weights, -1.0]
        room = rank - self.split.of(rank)
        mixed = mix(terms, shares, [scale] * len(terms), room, scale, residual)
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
        """Send the trained part.

        The residual is what it was, whatever weight decay did to it meanwhile.
        """
        part = self.split.trained(trained.adapter)
        return PartlySent(
            {"adapter": self.split.joined(part, self.split.frozen(payload.tensors["adapter"]))},
            sent={"trained": part},
        ), None
