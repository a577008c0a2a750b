"""The learned graph: tasks whose updates point the same way are related, as far as noise allows.

With x_k the updates at unit norm, c_kl their cosines, and V the x_k minus a share 1 - 2/K of their
mean over the K clients that trained, the weight of a pair is

    w_kl = max(0, cos(v_k, v_l) - 2 s) / FULL_DEGREE,    s^2 = mean of c_kl^2 over pairs c_kl < 0

Each client keeps its nearest few, the result is made symmetric by the larger value, divided by its
largest degree where that is above 1, and a moving average over rounds is kept. Only the Gram matrix
of the updates is needed, or a sketch of each.

Weights are absolute: a pair of unrelated clients has a cosine of noise, and is left alone even if
it is the best pair there is. s is the noise of a cosine between unrelated updates, which is as
often below 0 as above; over n such pairs it is known to about a share 1 / sqrt(2 n) of itself.
Where no cosine is negative, everybody learns much in common, and s is what the sketches of the
updates are off by, if there are any.

The share of the mean is ours. Taking the whole mean out makes all cosines of a few related clients
negative, as if they were strangers: the mean of a few cannot tell what everybody learns from what
relatives learn. With two clients nothing is taken out, with many nearly all. Updates have unit norm
before the mean is made, so that a large one does not bend it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmira.graphs.edges import (
    NO_EDGES,
    blended,
    degrees_of,
    joined,
    list_of_matrix,
)

__all__ = [
    "FULL_DEGREE",
    "Likeness",
    "SMALLEST_SHARE",
    "centred_cosines",
    "cosines_of",
    "likeness",
    "nearest_neighbours",
    "remember",
    "sketched_likeness",
]

NO_NORM = 1e-12
"""A squared norm below this, of a unit update without its share of the mean, is rounding."""
FULL_DEGREE = 0.5
"""A client whose cosines beyond noise sum to this is pulled all the way to its neighbours' mean."""
NOISE_FACTOR = 2.0
"""How many times its noise a cosine must be above 0 to be worth anything."""
LEAST_WEIGHT = 1e-3
"""Weights below this are none: a pull that float32 hardly holds."""
BLOCK_ROWS = 512
"""Rows of the cosines between sketches that are in memory at a time."""
SMALLEST_SHARE = 1e-6
"""Where updates are sketched, the moving average forgets weights below this share of its largest.

A pull that float32 hardly holds.
"""


def _share_of_mean(count: int) -> float:
    """How much of the mean over `count` clients is subtracted."""
    return max(0.0, 1 - 2 / count)


@dataclass(frozen=True, slots=True)
class Likeness:
    """The graph of one round, and what the cosines were that it was made of.

    Attributes:
        edges: edge list, float64 [E, 3], with largest degree 1 or less.
        noise: s, the noise of a cosine; where none is negative, that of the sketches, or 0.
        largest: the largest cosine of two clients, -1 where there are none.
        mean: the mean cosine of all pairs, 0 where there are none.
    """

    edges: Tensor
    noise: float = 0.0
    largest: float = -1.0
    mean: float = 0.0


def cosines_of(gram: Tensor, trained: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines between the updates of those that take part, float64 [n, n], and who they are [n].

    Args:
        gram: inner products of the updates, float64 [K, K].
        trained: which clients have trained, bool [K]; those whose update is zero take no part.
    """
    taking_part = torch.nonzero(trained & (gram.diagonal() > 0)).flatten()
    inner = gram[taking_part][:, taking_part]
    inverse_norm = inner.diagonal().rsqrt()
    cosines = (inner + inner.T) / 2 * inverse_norm[:, None] * inverse_norm[None, :]
    return cosines.fill_diagonal_(1), taking_part


def centred_cosines(gram: Tensor, trained: Tensor) -> Tensor:
    """Cosines between unit updates from which the share 1 - 2/K of their mean has been subtracted.

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
    inner, taking_part = cosines_of(gram, trained)
    if len(taking_part) == 0:
        return cosines
    share = _share_of_mean(len(taking_part))
    to_mean = share * inner.mean(dim=1)
    centred = inner - to_mean[:, None] - to_mean[None, :] + share * to_mean.mean()
    squared = centred.diagonal()
    inverse_norm = torch.where(
        squared > NO_NORM, squared.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0
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


def likeness(
    gram: Tensor,
    trained: Tensor,
    nearest: int,
    error: float = 0.0,
    arrange: Callable[[Tensor], Tensor] | None = None,
) -> Likeness:
    """The graph of one round from the Gram matrix of the updates.

    Args:
        gram: inner products of the updates, float64 [K, K]; rows of clients that never trained are
            not read.
        trained: which clients have trained, bool [K].
        nearest: neighbours each client chooses; it may be chosen by more.
        error: of the cosines themselves, root mean square, where they are estimates; the noise is
            no smaller.
        arrange: what is made of all weights, float64 [K, K], before neighbours are chosen; None
            leaves them.
    """
    raw, taking_part = cosines_of(gram, trained)
    count = len(taking_part)
    if count < 2:
        return Likeness(NO_EDGES)
    pairs = raw[tuple(torch.triu_indices(count, count, offset=1))]
    noise = _noise(float(pairs.clamp_max(0).square().sum()), int((pairs < 0).sum()), error)
    worth = _worth(centred_cosines(gram, trained), noise)
    if arrange is not None:
        worth = arrange(worth)
    edges = _scaled(list_of_matrix(nearest_neighbours(worth, nearest)), len(gram))
    return Likeness(edges, noise, float(pairs.max()), float(pairs.mean()))


def _noise(squares: float, count: int, error: float) -> float:
    """s, from the sum of squares of the negative cosines and how many they are."""
    return max(error, math.sqrt(squares / count) if count else 0.0)


def _worth(cosines: Tensor, noise: float) -> Tensor:
    """The weights that cosines are worth."""
    weights = (cosines - NOISE_FACTOR * noise) / FULL_DEGREE
    return torch.where(weights >= LEAST_WEIGHT, weights, 0.0)


def _scaled(edges: Tensor, count: int) -> Tensor:
    """The edges divided by their largest degree where that is above 1."""
    if len(edges):
        edges[:, 2] /= degrees_of(edges, count).max().clamp_min(1)
    return edges


def _point(sketches: Tensor) -> None:
    """Divide by the norms, in place, float32 [n, m]; zero where nothing is left."""
    norms = torch.linalg.vector_norm(sketches, dim=1)
    sketches.mul_(torch.where(norms > NO_NORM**0.5, 1 / norms, 0.0)[:, None])


def _measured(directions: Tensor) -> tuple[float, float, float]:
    """Noise, largest and mean of the cosines of all pairs of unit sketches, block by block."""
    squares, negative, largest, total, count = 0.0, 0, -1.0, 0.0, len(directions)
    for first in range(0, count, BLOCK_ROWS):
        end = min(first + BLOCK_ROWS, count)
        cosines = directions[first:end] @ directions[first:].T
        upper = torch.ones_like(cosines, dtype=torch.bool).triu(diagonal=1)
        pairs = cosines[upper]
        if len(pairs):
            squares += float(pairs.clamp_max(0).square().sum(dtype=torch.float64))
            negative += int((pairs < 0).sum())
            largest = max(largest, float(pairs.max()))
            total += float(pairs.sum(dtype=torch.float64))
    error = 1 / math.sqrt(directions.shape[1])  # of a cosine between sketches of m numbers
    return _noise(squares, negative, error), largest, total / (count * (count - 1) / 2)


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


def sketched_likeness(sketches: Tensor, trained: Tensor, nearest: int) -> Likeness:
    """The graph of one round, as `likeness` makes it, with cosines between sketches.

    Time grows with the square of the clients that trained, memory with their number; of equal
    weights any may be taken.

    Args:
        sketches: one for each client, float32 [K, m]; rows of clients that never trained are not
            read.
        trained: which clients have trained, bool [K].
        nearest: neighbours each client chooses; it may be chosen by more.
    """
    count = len(sketches)
    taking_part = torch.nonzero(trained & sketches.ne(0).any(dim=1)).flatten()
    if len(taking_part) < 2:
        return Likeness(NO_EDGES)
    nearest = min(nearest, len(taking_part) - 1)
    directions = sketches[taking_part]
    directions /= torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    noise, largest, mean = _measured(directions)
    directions.sub_(_share_of_mean(len(directions)) * directions.mean(dim=0))
    _point(directions)
    values, columns = _largest_in_rows(directions, nearest)
    worth = _worth(values.to(torch.float64), noise)
    chosen = worth > 0
    rows = taking_part[:, None].expand(-1, nearest)[chosen]
    edges = joined(rows, taking_part[columns[chosen]], worth[chosen], count)
    return Likeness(_scaled(edges, count), noise, largest, mean)


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
