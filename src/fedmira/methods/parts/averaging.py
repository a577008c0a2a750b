"""What methods with something in common to all clients share.

Weights by training rows, one rank, and the name of the common part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmira.adapters import Adapter, truncate_rank, weighted_sum
from fedmira.errors import ConfigError
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import PlainClient, ServerState
from fedmira.methods.context import AlgorithmContext

__all__ = ["COMMON", "CutToRank", "by_rows", "mean_by_rows", "require_one_rank"]

COMMON = "*common"
"""The common part in states that hold personal adapters too.

The star cannot be part of a client id.
"""


def by_rows(replies: Sequence[Reply]) -> tuple[list[Reply], list[float]]:
    """The replies in order of their clients' ids, and the share of each in the training rows of all of them."""
    ordered = sorted(replies, key=lambda reply: reply.client_id)
    total = sum(reply.num_examples for reply in ordered)
    return ordered, [reply.num_examples / total for reply in ordered]


def mean_by_rows(replies: Sequence[Reply]) -> Adapter:
    """The replies' adapters, averaged factor by factor."""
    ordered, weights = by_rows(replies)
    return weighted_sum([reply.payload.tensors["adapter"] for reply in ordered], weights)


@dataclass(frozen=True, slots=True)
class CutToRank(PlainClient):
    """One shared adapter of the largest rank, of which each client gets as many directions as its own rank has.

    Attributes:
        context: the federation.
    """

    context: AlgorithmContext

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The common start at the largest rank; every client's start is a cut of it."""
        return ServerState(
            {
                COMMON: next(
                    start
                    for client, start in starts.items()
                    if self.context.ranks[client] == self.context.largest_rank
                )
            }
        )

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """The shared adapter at the client's rank."""
        return Payload({"adapter": self.adapter_for(state, client)})

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """The first directions of the shared adapter, as many as the client's rank."""
        shared, rank = state.adapters[COMMON], self.context.ranks[client]
        return shared if rank == self.context.largest_rank else truncate_rank(shared, rank)


def require_one_rank(name: str, context: AlgorithmContext) -> None:
    """Refuse clients of different rank.

    Args:
        name: the algorithm's, for the message.

    Raises:
        ConfigError: two clients differ in rank.
    """
    unequal = context.unequal_ranks()
    if unequal is not None:
        one, other = unequal
        raise ConfigError(
            f"{name}: client {one!r} has rank {context.ranks[one]} and client {other!r} "
            f"rank {context.ranks[other]}; "
            "what is averaged factor by factor needs one rank (set "
            "adapter.rank_distribution to 'one' and take them out of "
            "adapter.ranks and adapter.rank_types, or set algorithm.name to 'flexlora' or 'mira')"
        )
