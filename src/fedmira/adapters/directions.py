"""Random directions in the space of an adapter, and movements written as sums of them.

A seed names a direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmira.adapters.arithmetic import Adapter

__all__ = ["COEFFICIENTS", "SEEDS", "direction", "moved_along", "movement", "summed_movements"]

SEEDS, COEFFICIENTS = "seeds", "coefficients"


def direction(seed: int, like: Adapter) -> dict[str, Tensor]:
    """Standard normal numbers in the shapes of `like`, the same for everybody who knows the seed.

    They are drawn in order of the names, so that the order in which an adapter was stored does not
    matter.

    Args:
        seed: names the direction.
        like: an adapter whose names and shapes the direction has.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(like[name].shape, generator=generator) for name in sorted(like)}


def movement(coefficients: Mapping[int, float]) -> dict[str, Tensor]:
    """What travels of a movement sum_j c_j z_j.

    "seeds", int32 [n] in ascending order, and "coefficients", float32 [n].
    """
    ordered = sorted(coefficients.items())
    return {
        SEEDS: torch.tensor([seed for seed, _ in ordered], dtype=torch.int32),
        COEFFICIENTS: torch.tensor([value for _, value in ordered], dtype=torch.float32),
    }


def summed_movements(movements: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum, seed by seed, in the given order in float64.

    Args:
        movements: coefficients by seed, one movement for each client.
        weights: one for each movement.
    """
    total: dict[int, float] = {}
    for part, weight in zip(movements, weights, strict=True):
        for seed, value in zip(part[SEEDS].tolist(), part[COEFFICIENTS].tolist(), strict=True):
            total[seed] = total.get(seed, 0.0) + weight * value
    return movement(total)


def moved_along(start: Adapter, moves: Adapter) -> dict[str, Tensor]:
    """start + sum_j c_j z_j, summed by ascending seed in float64: equal inputs give equal bits.

    Args:
        start: the adapter that is moved.
        moves: a movement: seeds z_j and their coefficients c_j.
    """
    total = {name: tensor.to(torch.float64) for name, tensor in start.items()}
    for seed, value in zip(moves[SEEDS].tolist(), moves[COEFFICIENTS].tolist(), strict=True):
        for name, part in direction(seed, start).items():
            total[name].add_(part, alpha=value)
    return {name: tensor.to(start[name].dtype) for name, tensor in total.items()}
