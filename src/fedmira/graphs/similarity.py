"""The learned graph: tasks whose updates point the same way are related.

With V the updates s B A minus a share 1 - 2/K of their mean over the K clients that trained, C_kl =
<v_k, v_l> / (|v_k| |v_l|); negative values are cut to 0, each client keeps its nearest few, the
result is made symmetric by the larger value and divided by its largest degree, and a moving average
over rounds is kept. Only the Gram matrix of the updates is needed, or a sketch of each.

The share is ours. Taking the whole mean out makes all cosines of a few related clients negative, as
if they were strangers: the mean of a few cannot tell what everybody learns from what relatives
learn. With two clients nothing is taken out, with many nearly all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmira.graphs.edges import (
    NO_EDGES,
    blended,
    degrees_of,
    joined,
)

__all__ = [
    "SMALLEST_SHARE",
    "centred_cosines",
    "nearest_neighbours",
    "remember",
    "similarity_weights",
    "sketched_similarity",
]

NO_NORM = 1e-12
"""A squared norm below this share of the largest one is rounding, not a direction."""
BLOCK_ROWS = 512
"""Rows of the cosines between sketches that are in memory at a time."""
SMALLEST_SHARE = 1e-6
"""Where updates are sketched, the moving average forgets weights below this share of its largest.

A pull that float32 hardly holds.
"""


def _share_of_mean(count: int) -> float:
    """How much of the mean over `count` clients is subtracted."""
    return max(0.0, 1 - 2 / count)


def centred_cosines(gram: Tensor, trained: Tensor) -> Tensor:
    """Cosines between updates from which the share 1 - 2/K of the mean update has been subtracted.

    Centring takes out what all tasks learn alike (the form of an answer), which would make every
    pair look related.

    Args:
        gram: inner products of the updates, float64 [K, K].
        trained: which clients have trained, bool [K]; the others, and those whose update is zero,
            take no part in the mean.

    Returns:
        float64 [K, K], symmetric with a zero diagonal; 0 for clients that take no part or equal the
        mean.
    """
    count = len(gram)
    cosines = torch.zeros(count, count, dtype=torch.float64)
    taking_part = torch.nonzero(trained & (gram.diagonal() > 0)).flatten()
    if len(taking_part) == 0:
        return cosines
    inner = gram[taking_part][:, taking_part]
    inner = (inner + inner.T) / 2
    share = _share_of_mean(len(taking_part))
    to_mean = share * inner.mean(dim=1)
    centred = inner - to_mean[:, None] - to_mean[None, :] + share * to_mean.mean()
    squared = centred.diagonal()
    has_direction = squared > NO_NORM * inner.diagonal().max()
    inverse_norm = torch.where(
        has_direction, squared.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0
    )
    cosine = (centred * inverse_norm[:, None] * inverse_norm[None, :]).fill_diagonal_(0)
    cosines[taking_part[:, None], taking_part[None, :]] = (cosine + cosine.T) / 2
    return cosines


def nearest_neighbours(weights: Tensor, nearest: int) -> Tensor:
    """Each client's `nearest` largest weights above 0, made symmetric by the larger value.

    The result is float64 [K, K].

    Of equal weights the client that comes first is taken.

    Args:
        weights: symmetric, float64 [K, K].
        nearest: how many neighbours each client keeps.
    """
    order = torch.sort(weights, dim=1, descending=True, stable=True).indices[:, :nearest]
    kept = torch.zeros_like(weights).scatter_(1, order, weights.gather(1, order)).clamp_min_(0)
    return torch.maximum(kept, kept.T)


def similarity_weights(gram: Tensor, trained: Tensor, nearest: int) -> Tensor:
    """The graph of one round from the Gram matrix of the updates.

    Args:
        gram: inner products of the updates, float64 [K, K]; rows of clients that never trained are
            not read.
        trained: which clients have trained, bool [K].
        nearest: neighbours each client chooses; it may be chosen by more.

    Returns:
        float64 [K, K], symmetric, non-negative, zero diagonal, largest degree 1; all zero when
        nobody is related.
    """
    weights = nearest_neighbours(centred_cosines(gram, trained).clamp_min(0), nearest)
    largest = weights.sum(dim=1).max() if len(weights) else torch.zeros((), dtype=torch.float64)
    return weights / largest if float(largest) > 0 else weights


def _point(sketches: Tensor) -> None:
    """Subtract the share of the mean and divide by the norms, in place, float32 [n, m].

    Zero where nothing is left.
    """
    largest = float(torch.linalg.vector_norm(sketches, dim=1).max())
    sketches.sub_(_share_of_mean(len(sketches)) * sketches.mean(dim=0))
    norms = torch.linalg.vector_norm(sketches, dim=1)
    sketches.mul_(torch.where(norms > NO_NORM**0.5 * largest, 1 / norms, 0.0)[:, None])


def _largest_in_rows(directions: Tensor, nearest: int) -> tuple[Tensor, Tensor]:
    """The `nearest` largest inner products of each row with other rows, 0 or more, and with whom.

    They are float32 and int64 [n, nearest].

    Block by block of the upper half of all pairs, so that each is computed once and memory stays
    bounded.
    """
    count = len(directions)
    values, columns = torch.zeros(count, nearest), torch.zeros(count, nearest, dtype=torch.int64)

    def offer(rows: slice, candidates: Tensor, first: int) -> None:
        """Let the rows choose again among what they have and the candidates.

        The candidates are columns `first` and on.
        """
        best, place = candidates.topk(min(nearest, candidates.shape[1]), dim=1)
        have, whom = (
            torch.cat([values[rows], best], dim=1),
            torch.cat([columns[rows], place + first], dim=1),
        )
        values[rows], chosen = have.topk(nearest, dim=1)
        columns[rows] = whom.gather(1, chosen)

    for first in range(0, count, BLOCK_ROWS):
        end = min(first + BLOCK_ROWS, count)
        cosines = directions[first:end] @ directions[first:].T
        cosines.diagonal().zero_()
        offer(slice(first, end), cosines, first)
        if end < count:
            offer(slice(end, count), cosines[:, end - first :].T, first)
    return values, columns


def sketched_similarity(sketches: Tensor, trained: Tensor, nearest: int) -> Tensor:
    """The graph of one round, as `similarity_weights` makes it, with cosines between sketches.

    Time grows with the square of the clients that trained, memory with their number; of equal
    weights any may be taken.

    Args:
        sketches: one for each client, float32 [K, m]; rows of clients that never trained are not
            read.
        trained: which clients have trained, bool [K].
        nearest: neighbours each client chooses; it may be chosen by more.

    Returns:
        Edge list, float64 [E, 3], with largest degree 1.
    """
    count = len(sketches)
    taking_part = torch.nonzero(trained & sketches.ne(0).any(dim=1)).flatten()
    if len(taking_part) < 2:
        return NO_EDGES
    nearest = min(nearest, len(taking_part) - 1)
    directions = sketches[taking_part]
    _point(directions)
    values, columns = _largest_in_rows(directions, nearest)
    chosen = values > 0
    rows = taking_part[:, None].expand(-1, nearest)[chosen]
    edges = joined(rows, taking_part[columns[chosen]], values[chosen].to(torch.float64), count)
    if len(edges) == 0:
        return edges
    edges[:, 2] /= degrees_of(edges, count).max()
    return edges


def remember(
    old: Tensor, new: Tensor, memory: float, count: int, smallest_share: float = 0.0
) -> Tensor:
    """M = memory * M + (1 - memory) * new on edge lists.

    The first graph that has an edge is taken as it is.

    Args:
        old, new: edge lists, float64 [E, 3].
        memory: share of the old one, 0..1.
        count: clients.
        smallest_share: weights below this share of the largest are forgotten. With 1e-6, an edge
            that is not renewed is gone after ln(1e6) / ln(1 / memory) rounds (20 for 0.5), so the
            edges stay within that many graphs.
    """
    if len(old) == 0:
        return new
    edges = blended(old, new, memory, count)
    return edges[edges[:, 2] >= smallest_share * edges[:, 2].max()] if len(edges) else edges
