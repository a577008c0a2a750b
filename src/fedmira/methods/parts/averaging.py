"""What methods with something in common to all clients share.

Weights by training rows, one rank, and the name of the common part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from fedmira.adapters import Adapter, median_of, trimmed_mean, truncate_rank, weighted_sum
from fedmira.config import ServerSettings
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import Method, ServerState

__all__ = ["COMMON", "CutToRank", "by_rows", "mean_of"]

COMMON = "*common"
"""The common part in states that hold personal adapters too.

The star cannot be part of a client id.
"""


def by_rows(replies: Sequence[Reply]) -> tuple[list[Reply], list[float]]:
    """The replies in order of their clients' ids, and the share of each in all training rows."""
    ordered = sorted(replies, key=lambda reply: reply.client_id)
    total = sum(reply.num_examples for reply in ordered)
    return ordered, [reply.num_examples / total for reply in ordered]


def mean_of(replies: Sequence[Reply], server: ServerSettings) -> Adapter:
    """The replies' adapters, averaged factor by factor, by rows or as [server] says.

    Args:
        replies: whose "adapter" is averaged.
        server: the settings of [server].
    """
    ordered, weights = by_rows(replies)
    adapters = [reply.payload.tensors["adapter"] for reply in ordered]
    if server.combine == "median":
        return median_of(adapters)
    if server.combine == "trimmed":
        return trimmed_mean(adapters, server.trim)
    return weighted_sum(adapters, weights)


class CutToRank(Method):
    """One shared adapter of the largest rank, cut to as many directions as a client's rank has."""

    takes_newcomers: ClassVar[bool] = True

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
