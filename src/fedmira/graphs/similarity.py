"""The learned graph: tasks whose updates point the same way are related.

With V the updates s B A minus a share 1 - 2/K of their mean over the K clients that trained, C_kl = <v_k, v_l> / (|v_k| |v_l|);
negative values are cut to 0, each client keeps its nearest few, the result is made symmetric by the larger value and divided by
its largest degree, and a moving average over rounds is kept. Only the Gram matrix of the updates is needed.

The share is ours. Taking the whole mean out makes all cosines of a few related clients negative, as if they were strangers: the
mean of a few cannot tell what everybody learns from what relatives learn. With two clients nothing is taken out, with many nearly all.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["centred_cosines", "nearest_neighbours", "remember", "similarity_weights"]

NO_NORM = 1e-12
"""A squared norm below this share of the largest one is rounding, not a direction."""


def centred_cosines(gram: Tensor, trained: Tensor) -> Tensor:
    """Cosines between updates from which the share 1 - 2/K of the mean update has been subtracted.

    Centring takes out what all tasks learn alike (the form of an answer), which would make every pair look related.

    Args:
        gram: inner products of the updates, float64 [K, K].
        trained: which clients have trained, bool [K]; the others, and those whose update is zero, take no part in the mean.

    Returns:
        float64 [K, K], symmetric with a zero diagonal; 0 for clients that take no part or equal the mean.
    """
    count = len(gram)
    cosines = torch.zeros(count, count, dtype=torch.float64)
    taking_part = torch.nonzero(trained & (gram.diagonal() > 0)).flatten()
    if len(taking_part) == 0:
        return cosines
    inner = gram[taking_part][:, taking_part]
    inner = (inner + inner.T) / 2
    share = max(0.0, 1 - 2 / len(taking_part))
    to_mean = share * inner.mean(dim=1)
    centred = inner - to_mean[:, None] - to_mean[None, :] + share * to_mean.mean()
    squared = centred.diagonal()
    has_direction = squared > NO_NORM * inner.diagonal().max()
    inverse_norm = torch.where(has_direction, squared.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    cosine = (centred * inverse_norm[:, None] * inverse_norm[None, :]).fill_diagonal_(0)
    cosines[taking_part[:, None], taking_part[None, :]] = (cosine + cosine.T) / 2
    return cosines


def nearest_neighbours(weights: Tensor, nearest: int) -> Tensor:
    """Each client's `nearest` largest weights above 0, made symmetric by the larger value; float64 [K, K].

    Of equal weights the client that comes first is taken.
    """
    order = torch.sort(weights, dim=1, descending=True, stable=True).indices[:, :nearest]
    kept = torch.zeros_like(weights).scatter_(1, order, weights.gather(1, order)).clamp_min_(0)
    return torch.maximum(kept, kept.T)


def similarity_weights(gram: Tensor, trained: Tensor, nearest: int) -> Tensor:
    """The graph of one round from the Gram matrix of the updates.

    Args:
        gram: inner products of the updates, float64 [K, K]; rows of clients that never trained are not read.
        trained: which clients have trained, bool [K].
        nearest: neighbours each client chooses; it may be chosen by more.

    Returns:
        float64 [K, K], symmetric, non-negative, zero diagonal, largest degree 1; all zero when nobody is related.
    """
    weights = nearest_neighbours(centred_cosines(gram, trained).clamp_min(0), nearest)
    largest = weights.sum(dim=1).max() if len(weights) else torch.zeros((), dtype=torch.float64)
    return weights / largest if float(largest) > 0 else weights


def remember(old: Tensor, new: Tensor, memory: float) -> Tensor:
    """M = memory * M + (1 - memory) * new; the first graph that has an edge is taken as it is."""
    return memory * old + (1 - memory) * new if bool(old.any()) else new
