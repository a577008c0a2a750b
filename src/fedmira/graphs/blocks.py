"""Weights between clients that are led to fall apart into blocks.

After Yang et al. 2020, "Task-Feature Collaborative Learning with Application to Personalized
Attribute Prediction" (TFCL), arXiv 2004.13930. A graph has c components or more exactly when the c
smallest eigenvalues e_i of its Laplacian L are 0, so their sum is a price on edges between blocks.
On weights C that are given, with beta its strength, it asks for

    min over M >= 0 of   1/2 sum over pairs of (M_kl - C_kl)^2  +  beta / 2 * sum_{i <= c} e_i(L(M))
    sum_{i <= c} e_i(L)  =  min of tr(L U)  over  0 <= U <= I,  tr U = c

and both halves in turn have a closed form, each of which lowers the sum:

    U     =  the projector on the c lowest eigenvectors of L(M)
    D_kl  =  U_kk + U_ll - 2 U_kl,    so that   tr(L U) = sum over pairs of M_kl D_kl
    M_kl  =  max(0, C_kl - beta / 2 * D_kl)

With F the c eigenvectors, D_kl is |f_k - f_l|^2: about 1 / n_k + 1 / n_l between blocks of n_k and
n_l clients, and near 0 within one. Where eigenvalues are equal at the cut, any of their vectors
would do; U then takes all of them by equal shares, which is as low, and depends neither on signs
nor on the order of the clients.

The number of blocks, where it is not given, is where the eigenvalues of L(C) have their largest
gap, up to the root of the number of clients. That the graph is the clients' and not one of tasks
and features, as in the paper, is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmira.errors import ConfigError

__all__ = ["Blocks", "MOST_CLIENTS", "check_blocks", "in_blocks"]

MOST_CLIENTS = 2000
"""Clients above which decompositions of K x K numbers would take longer than training."""
ALTERNATIONS = 30
"""Most times that both halves take turns."""
ROUNDING = 1e-9
"""Of the largest eigenvalue or weight: what differs by less is equal."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Weights after the price on edges between blocks, and how they came to be.

    Attributes:
        weights: M, symmetric with a zero diagonal, float64 [K, K].
        count: c, the blocks that were aimed at; 0 where no client has a weight.
        before: sum of the c smallest eigenvalues for C.
        after: the same for M.
    """

    weights: Tensor
    count: int
    before: float
    after: float


def check_blocks(blocks: int, clients: int) -> None:
    """Refuses what cannot be put in blocks, before anything is trained.

    Args:
        blocks: of `graph.blocks`, 0 where it is left open.
        clients: how many there are.

    Raises:
        ConfigError: too many clients, or more blocks than pairs of clients.
    """
    if clients > MOST_CLIENTS:
        raise ConfigError(
            f"graph.kind = 'blocks': {clients:,} clients; eigenvectors are found for at most "
            f"{MOST_CLIENTS:,} (set graph.kind to 'similarity', or lower data.clients)"
        )
    if blocks > max(1, clients // 2):
        raise ConfigError(
            f"graph.blocks = {blocks}: a block of 1 relates nobody, so {clients} clients make at "
            f"most {max(1, clients // 2)} (lower it; 0 takes the largest gap between eigenvalues)"
        )


def in_blocks(weights: Tensor, blocks: int, strength: float) -> Blocks:
    """Lower the weights between blocks until they no longer change, 30 times at most.

    Clients without any weight are left out of the count: nothing has to part them. Of n others no
    more than n / 2 blocks are aimed at, so that few clients of an early round are not torn apart.

    Args:
        weights: C, symmetric, 0 or more, with a zero diagonal, float64 [K, K].
        blocks: c; 0 takes the largest gap between eigenvalues.
        strength: beta; 0 leaves the weights as they are.
    """
    related = torch.nonzero(weights.any(dim=1)).flatten()
    if len(related) == 0:
        return Blocks(weights, 0, 0.0, 0.0)
    given = weights[related][:, related]
    lowest = torch.linalg.eigvalsh(_laplacian(given))
    count = min(blocks, len(related) // 2) if blocks else _largest_gap(lowest)
    found = given
    for _ in range(ALTERNATIONS if strength else 0):
        distances = _distances(_projector(_laplacian(found), count))
        lowered = (given - strength / 2 * distances).clamp_min(0).fill_diagonal_(0)
        still = bool((lowered - found).abs().max() <= ROUNDING * given.max())
        found = lowered
        if still:
            break
    after = torch.linalg.eigvalsh(_laplacian(found))
    result = torch.zeros_like(weights)
    result[related[:, None], related[None, :]] = found
    return Blocks(result, count, _sum_of(lowest, count), _sum_of(after, count))


def _sum_of(eigenvalues: Tensor, count: int) -> float:
    """The sum of the lowest ones; those of a Laplacian are not negative but by rounding."""
    return max(0.0, float(eigenvalues[:count].sum()))


def _laplacian(weights: Tensor) -> Tensor:
    return torch.diag(weights.sum(dim=1)) - weights


def _largest_gap(eigenvalues: Tensor) -> int:
    """How many eigenvalues lie below the largest gap; of equal gaps the first counts.

    Args:
        eigenvalues: of the Laplacian of n clients, ascending, float64 [n], n at least 2.
    """
    gaps = torch.diff(eigenvalues)[: math.isqrt(len(eigenvalues))]
    equal = gaps >= gaps.max() - ROUNDING * eigenvalues[-1]
    return int(torch.nonzero(equal).flatten()[0]) + 1


def _projector(laplacian: Tensor, count: int) -> Tensor:
    """U, float64 [n, n], of trace `count`; equal eigenvalues at the cut have equal shares."""
    values, vectors = torch.linalg.eigh(laplacian)
    apart = values - values[count - 1]
    equal = apart.abs() <= ROUNDING * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    below = (apart < 0) & ~equal
    share = (count - int(below.sum())) / int(equal.sum())
    shares = below.to(torch.float64) + share * equal
    projector: Tensor = (vectors * shares) @ vectors.T
    return projector


def _distances(projector: Tensor) -> Tensor:
    """D, float64 [n, n], 0 or more."""
    own = projector.diagonal()
    return (own[:, None] + own[None, :] - 2 * projector).clamp_min(0)
