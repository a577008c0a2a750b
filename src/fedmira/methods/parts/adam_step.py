"""Adam (Kingma and Ba 2015) on a few numbers of one client, for one round of local training."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["AdamStep"]

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


class AdamStep:
    """Moments that begin at zero, and the steps that come of them.

    Args:
        like: the numbers, in any shape; moments have their shape and type.
        rate: the learning rate.
    """

    def __init__(self, like: Tensor, rate: float) -> None:
        self._first = self._second = torch.zeros_like(like)
        self._rate, self._steps = rate, 0

    def to(self, device: torch.device) -> None:
        """Takes the moments to where the gradient is.

        Args:
            device: of the gradient.
        """
        self._first, self._second = self._first.to(device), self._second.to(device)

    def along(self, slope: Tensor) -> Tensor:
        """What is to be taken from the numbers, in their shape; one more step is counted.

        Args:
            slope: the gradient, in their shape.
        """
        self._steps += 1
        first, second = _BETAS
        self._first = first * self._first + (1 - first) * slope
        self._second = second * self._second + (1 - second) * slope.square()
        mean = self._first / (1 - first**self._steps)
        size = (self._second / (1 - second**self._steps)).sqrt()
        return self._rate * mean / (size + _EPSILON)
