"""Averages of adapters that a few wild ones cannot drag away: entry by entry, all weigh alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedmira.adapters.arithmetic import Adapter, map_tensors

__all__ = ["median_of", "trimmed_mean"]


def median_of(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """The median of each entry, and of an even number the mean of the middle two.

    Args:
        adapters: one or more, of equal names and shapes.
    """
    return _inner_mean(adapters, (len(adapters) - 1) // 2)


def trimmed_mean(adapters: Sequence[Adapter], share: float) -> dict[str, Tensor]:
    """The mean of each entry without its largest and smallest values.

    >>> import torch
    >>> from fedmira.adapters import trimmed_mean
    >>> values = (1.0, 2.0, 3.0, 900.0)
    >>> trimmed_mean([{"A": torch.tensor([value])} for value in values], 0.25)
    {'A': tensor([2.5000])}

    Args:
        adapters: one or more, of equal names and shapes.
        share: of all values that are left out at either end, rounded up; one or two stay.
    """
    cut = math.ceil(share * len(adapters) - 1e-9)  # 0.1 of 30 is 3, in floats 3.0000000000000004
    return _inner_mean(adapters, min(cut, (len(adapters) - 1) // 2))


def _inner_mean(adapters: Sequence[Adapter], cut: int) -> dict[str, Tensor]:
    """The mean of each entry's values without `cut` of them at either end, summed in float64."""

    def combine(*tensors: Tensor) -> Tensor:
        ordered = torch.stack(tensors).to(torch.float64).sort(dim=0).values
        return ordered[cut : len(tensors) - cut].mean(dim=0).to(tensors[0].dtype)

    return map_tensors(combine, *adapters)
