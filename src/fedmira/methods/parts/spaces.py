"""What a weighted mean of adapters is: of their products, cut to a rank, or of their factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedmira.adapters import Adapter, mix, weighted_sum
from fedmira.methods.parts.kept_products import Taken

__all__ = ["MIX"]


def _mix_products(
    taken: Taken, weights: list[float], rank: int, scale: float, own: Adapter
) -> tuple[Adapter, float]:
    """sum_l P_kl s_l B_l A_l at the receiver's rank and scale.

    With it comes the norm that the rank could not hold.
    """
    mixed = mix(taken[0], weights, taken[1], rank, scale, own)
    return mixed.adapter, mixed.tail


def _mix_factors(
    taken: Taken, weights: list[float], rank: int, scale: float, own: Adapter
) -> tuple[Adapter, float]:
    """sum_l P_kl A_l and sum_l P_kl B_l, which keeps the rank."""
    return weighted_sum(taken[0], weights), 0.0


MIX: Mapping[str, Callable[[Taken, list[float], int, float, Adapter], tuple[Adapter, float]]] = {
    "product": _mix_products,
    "factor": _mix_factors,
}
"""Space -> (adapters with their scales, weights, rank, scale, own adapter) -> the mean, and the
norm of what the rank could not hold."""
