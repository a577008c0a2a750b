"""Whom each client should collaborate with, and how much.

This is the quadratic programme of pFedGraph, solved by a projection.

Ye et al. 2023, "Personalized Federated Learning with Inferred Collaboration Graphs", ICML 2023.
Client k's weights x, itself included, balance its likeness to the others against their share p of
the data:

    minimise over the simplex   alpha |x|^2 + d^T x - 2 alpha p^T x
    with                        d_l = -cos(update_k, update_l)

which is alpha |x - (p - d / (2 alpha))|^2 up to a constant, so x is the Euclidean projection of p -
d / (2 alpha) on the simplex.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["collaboration_weights", "project_on_simplex"]

ALIKE = 0.9
"""Cosines above this count as 1, as in the authors' code."""


def project_on_simplex(rows: Tensor) -> Tensor:
    """The nearest point of the simplex {x >= 0, sum x = 1} to each row, float64 [n, m].

    By the way of Held, Wolfe and Crowder (1974).
    """
    descending = rows.sort(dim=1, descending=True).values
    places = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64)
    excess = (descending.cumsum(dim=1) - 1) / places
    last = (descending > excess).sum(dim=1, keepdim=True) - 1
    return (rows - excess.gather(1, last)).clamp_min(0)


def collaboration_weights(cosines: Tensor, shares: Tensor, alpha: float) -> Tensor:
    """Every client's weights for all clients.

    Args:
        cosines: between updates, float64 [n, n] with ones on the diagonal.
        shares: of the training rows, float64 [n], with sum 1.
        alpha: above 0; the larger, the more the data shares count and the less the likeness.

    Returns:
        float64 [n, n]; rows are 0 or more and sum to 1. It is not symmetric.
    """
    likeness = torch.where(cosines > ALIKE, 1.0, cosines)
    return project_on_simplex(shares[None, :] + likeness / (2 * alpha))
