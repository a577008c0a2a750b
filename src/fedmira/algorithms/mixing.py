"""How far each client of a round moves towards whom: the row-stochastic matrix P of MIRA's server step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmira.config.schema import MiraSettings

__all__ = ["Mixing", "mixing_matrix"]

ROUNDING = 1e-9
"""A pull above 1 by less than this is the rounding of a degree, not a step that is too large."""


@dataclass(frozen=True, slots=True)
class Mixing:
    """One server step.

    Attributes:
        matrix: P, float64 [K, K]: row k is what client k is made of; rows sum to 1, entries are 0 or more, and the row of a client
            that does not move is exactly that of the identity.
        pulls: 1 - P_kk, the share of the way to the mean of its neighbours, float64 [K].
        server_step: gamma, after the guard.
        guarded: whether gamma was cut so that nobody overshoots its neighbours.
    """

    matrix: Tensor
    pulls: Tensor
    server_step: float
    guarded: bool


def _fresh(cohort: Tensor, trained: Tensor) -> tuple[Tensor, float]:
    """Clients of this round, as they are: the pull shrinks with participation."""
    return cohort, 1.0


def _rescaled(cohort: Tensor, trained: Tensor) -> tuple[Tensor, float]:
    """Clients of this round, times (K - 1) / (|S| - 1): given that k is in it, the mean over cohorts is the full Laplacian."""
    others = int(cohort.sum()) - 1
    return cohort, (len(cohort) - 1) / others if others else 0.0


def _stale(cohort: Tensor, trained: Tensor) -> tuple[Tensor, float]:
    """All clients that ever trained, as they are stored."""
    return trained, 1.0


_POLICIES: Mapping[str, Callable[[Tensor, Tensor], tuple[Tensor, float]]] = {"fresh": _fresh, "rescaled": _rescaled, "stale": _stale}


def _server_step(settings: MiraSettings, weights: Tensor) -> float:
    """gamma before the guard: as set, or coupling / max degree of the whole graph; 0 without edges."""
    max_degree = float(weights.sum(dim=1).max())
    if max_degree == 0:
        return 0.0
    return settings.coupling / max_degree if settings.server_step is None else settings.server_step


def mixing_matrix(settings: MiraSettings, weights: Tensor, cohort: Tensor, trained: Tensor, rows: Tensor) -> Mixing:
    """P_kl = gamma_k c a_kl for k in the cohort and l among its neighbours, P_kk = 1 - sum_l P_kl; I elsewhere.

    gamma_k = gamma * size_scale / (size_scale + rows_k): clients with much data of their own move less. When the largest pull
    gamma_k c sum_l a_kl is above 1, gamma is cut for all clients so that it is 1.

    Args:
        settings: coupling or server_step, size_scale, neighbours.
        weights: a_kl of the graph, float64 [K, K].
        cohort: clients that trained in this round, bool [K].
        trained: clients that ever trained, those of this round included, bool [K].
        rows: training rows of each client, float64 [K]; read for the cohort.
    """
    neighbours, factor = _POLICIES[settings.neighbours](cohort, trained)
    gamma = _server_step(settings, weights)
    share = settings.size_scale / (settings.size_scale + rows) if settings.size_scale > 0 else torch.ones_like(rows)
    acting = weights * (cohort[:, None] & neighbours[None, :])
    steps = gamma * factor * share[:, None] * acting
    strongest = float(steps.sum(dim=1).max())
    if strongest > 1:
        steps, gamma = steps / strongest, gamma / strongest
    pulls = steps.sum(dim=1).clamp_max(1)
    return Mixing(steps + torch.diag(1 - pulls), pulls, gamma, strongest > 1 + ROUNDING)
