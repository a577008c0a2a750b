"""What methods with something in common to all clients share: weights by training rows, one rank, and the name of the common part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedmira.adapters import Adapter, weighted_sum
from fedmira.algorithms.context import AlgorithmContext
from fedmira.errors import ConfigError
from fedmira.messages import ClientId, Reply

__all__ = ["COMMON", "by_rows", "mean_by_rows", "require_one_rank", "widest_start"]

COMMON = "*common"
"""The common part in states that hold personal adapters too: the star cannot be part of a client id."""


def by_rows(replies: Sequence[Reply]) -> tuple[list[Reply], list[float]]:
    """The replies in order of their clients' ids, and the share of each in the training rows of all of them."""
    ordered = sorted(replies, key=lambda reply: reply.client_id)
    total = sum(reply.num_examples for reply in ordered)
    return ordered, [reply.num_examples / total for reply in ordered]


def mean_by_rows(replies: Sequence[Reply]) -> Adapter:
    """The replies' adapters, averaged factor by factor."""
    ordered, weights = by_rows(replies)
    return weighted_sum([reply.payload.tensors["adapter"] for reply in ordered], weights)


def widest_start(starts: Mapping[ClientId, Adapter], context: AlgorithmContext) -> Adapter:
    """The common start at the largest rank; every client's start is a cut of it."""
    return next(start for client, start in starts.items() if context.ranks[client] == context.largest_rank)


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
            f"{name}: client {one!r} has rank {context.ranks[one]} and client {other!r} rank {context.ranks[other]}; "
            "what is averaged factor by factor needs one rank (take them out of adapter.ranks, or set algorithm.name to "
            "'mira' or 'flexlora')"
        )
