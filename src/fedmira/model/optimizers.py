"""Optimizers over a cohort's matrix [K, P]: one step moves every active client, each with its own moments and step count.

The update rules are those of `torch.optim` (AdamW: Loshchilov & Hutter 2019; Adam with coupled weight decay: Kingma & Ba 2015).
They are written here because clients of one cohort may have taken different numbers of steps and some may have stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["OPTIMIZERS", "CohortOptimizer", "Moments", "clip_rows"]

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


@dataclass(slots=True)
class Moments:
    """State of all clients: first and second moment [K, P] and steps taken so far, int64 [K]."""

    first: Tensor
    second: Tensor
    steps: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> Moments:
        """Zero moments for values of shape [K, P]."""
        return cls(torch.zeros_like(like), torch.zeros_like(like), torch.zeros(len(like), dtype=torch.long, device=like.device))


@dataclass(frozen=True, slots=True)
class CohortOptimizer:
    """A named update rule with its settings."""

    name: str
    learning_rate: float
    weight_decay: float

    def step(self, values: Tensor, gradients: Tensor, moments: Moments, active: Tensor) -> None:
        """Move the rows `active` (int64 indices) of `values` in place."""
        everyone = len(active) == len(values)
        rows = slice(None) if everyone else active
        value, gradient = values[rows], gradients[rows]
        first, second = moments.first[rows], moments.second[rows]
        moments.steps[rows] += 1
        OPTIMIZERS[self.name](self, value, gradient, first, second, moments.steps[rows].double()[:, None])
        if not everyone:
            values[rows], moments.first[rows], moments.second[rows] = value, first, second


def clip_rows(gradients: Tensor, limit: float) -> Tensor:
    """Scale each client's gradient row in place to a norm of at most `limit` (0 = no limit); returns the norms before, [K]."""
    norms: Tensor = torch.linalg.vector_norm(gradients, dim=1)
    if limit:
        gradients.mul_((limit / (norms + 1e-6)).clamp(max=1.0)[:, None])
    return norms


def _adamw(settings: CohortOptimizer, value: Tensor, gradient: Tensor, first: Tensor, second: Tensor, steps: Tensor) -> None:
    value.mul_(1 - settings.learning_rate * settings.weight_decay)
    _adam_step(settings, value, gradient, first, second, steps)


def _adam(settings: CohortOptimizer, value: Tensor, gradient: Tensor, first: Tensor, second: Tensor, steps: Tensor) -> None:
    _adam_step(settings, value, gradient.add(value, alpha=settings.weight_decay), first, second, steps)


def _adam_step(settings: CohortOptimizer, value: Tensor, gradient: Tensor, first: Tensor, second: Tensor, steps: Tensor) -> None:
    first.lerp_(gradient, 1 - _BETA1)
    second.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
    # The corrections are small differences of numbers near 1: float64, then the dtype of the values.
    step_size, second_share = ((settings.learning_rate / (1 - _BETA1**steps)), (1 - _BETA2**steps).sqrt())
    denominator = second.sqrt().div_(second_share.to(value.dtype)).add_(_EPSILON)
    value.sub_(first / denominator * step_size.to(value.dtype))


def _sgd(settings: CohortOptimizer, value: Tensor, gradient: Tensor, first: Tensor, second: Tensor, steps: Tensor) -> None:
    value.sub_(gradient.add(value, alpha=settings.weight_decay), alpha=settings.learning_rate)


OPTIMIZERS: dict[str, Callable[[CohortOptimizer, Tensor, Tensor, Tensor, Tensor, Tensor], None]] = {
    "adamw": _adamw,
    "adam": _adam,
    "sgd": _sgd,
}
