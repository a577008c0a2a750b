"""Optimizers over a cohort's matrix [K, P].

One step moves every active client, each with its own moments and step count.

The update rules are those of `torch.optim` (AdamW: Loshchilov & Hutter 2019; Adam with coupled
weight decay: Kingma & Ba 2015). They are written here because clients of one cohort may have taken
different numbers of steps and some may have stopped.

Sophia (Liu et al. 2023, arXiv 2305.14342) as clients' optimizer is Fed-Sophia (Elbakary et al.
2024, arXiv 2406.06655). With the gradient g, and every few steps a gradient e of the mean loss on N
tokens whose targets are drawn from the model itself,

    h <- b2 h + (1 - b2) N e * e     (N e * e is on average the diagonal of the Gauss-Newton matrix)
    m <- b1 m + (1 - b1) g
    w <- w - lr decay w
    w <- w - lr clip(m / max(gamma h, epsilon), -rho, rho)

Fed-Sophia writes it with gamma = 1; Sophia with rho = 1. Dividing gamma by c, with rho times c and
lr / c, is the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["OPTIMIZERS", "CohortOptimizer", "Moments", "add_curvature", "clip_rows"]

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8
_SOPHIA_BETA1, _SOPHIA_BETA2, _SOPHIA_EPSILON = 0.965, 0.95, 1e-12


@dataclass(slots=True)
class Moments:
    """State of all clients: first and second moment [K, P] and steps taken so far, int64 [K].

    Sophia's second moment is its estimate of the curvature, which `add_curvature` refreshes.

    Attributes:
        first: first moment [K, P].
        second: second moment [K, P].
        steps: steps taken so far, int64 [K].
    """

    first: Tensor
    second: Tensor
    steps: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> Moments:
        """Zero moments for values of shape [K, P]."""
        return cls(
            torch.zeros_like(like),
            torch.zeros_like(like),
            torch.zeros(len(like), dtype=torch.long, device=like.device),
        )


@dataclass(frozen=True, slots=True)
class CohortOptimizer:
    """A named update rule with its settings; `gamma` and `rho` are Sophia's.

    Attributes:
        name: as `local.optimizer` names it.
        learning_rate: step size.
        weight_decay: times the values, it is added to the gradient (sgd, adam), or taken off
            apart from it (adamw, sophia).
        gamma: scale of Sophia's curvature.
        rho: most that an entry moves, in learning rates (Sophia).
    """

    name: str
    learning_rate: float
    weight_decay: float
    gamma: float = 1.0
    rho: float = 1.0

    def step(
        self,
        values: Tensor,
        gradients: Tensor,
        moments: Moments,
        active: Tensor,
        shares: Tensor | None = None,
    ) -> Tensor | None:
        """Move the rows `active` (int64 indices) of `values` in place.

        Args:
            values: parameters, one row a client, [K, P]; changed in place.
            gradients: [K, P].
            moments: changed in place.
            active: the rows that move, int64.
            shares: of the learning rate that each entry moves by, [active, P] or [active, 1];
                every rule is linear in the rate. None where all are 1.

        Returns:
            Of each of these rows the number of entries whose step was clipped, int64, or None where
            the rule clips no entries.
        """
        everyone = len(active) == len(values)
        rows = slice(None) if everyone else active
        value, gradient = values[rows], gradients[rows]
        first, second = moments.first[rows], moments.second[rows]
        moments.steps[rows] += 1
        before = value.clone() if shares is not None else value
        clipped = OPTIMIZERS[self.name](
            self, value, gradient, first, second, moments.steps[rows].double()[:, None]
        )
        if shares is not None:
            torch.lerp(before, value, shares.to(value.dtype).expand_as(value), out=value)
        if not everyone:
            values[rows], moments.first[rows], moments.second[rows] = value, first, second
        return clipped


def clip_rows(gradients: Tensor, limit: float) -> Tensor:
    """Scale each client's gradient row in place to a norm of at most `limit` (0 = no limit).

    Returns what is left of each, [K].

    Args:
        gradients: [K, P].
        limit: largest norm of a row; 0 = no limit.
    """
    if not limit:
        return gradients.new_ones(len(gradients))
    shares: Tensor = (limit / (torch.linalg.vector_norm(gradients, dim=1) + 1e-6)).clamp(max=1.0)
    gradients.mul_(shares[:, None])
    return shares


def add_curvature(moments: Moments, gradients: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """Refresh Sophia's estimate of some clients.

    H <- b2 h + (1 - b2) N e * e (Gauss-Newton-Bartlett).

    Args:
        moments: `second` is h; its rows are changed in place.
        gradients: [K, P], e: each client's gradient of its mean loss on targets drawn from the
            model.
        rows: int64 indices of the clients.
        tokens: N of each of them, as many as were averaged over.
    """
    estimate = gradients[rows].square_().mul_(tokens.to(gradients.dtype)[:, None])
    moments.second[rows] = moments.second[rows].lerp_(estimate, 1 - _SOPHIA_BETA2)


def _adamw(
    settings: CohortOptimizer,
    value: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
) -> None:
    value.mul_(1 - settings.learning_rate * settings.weight_decay)
    _adam_step(settings, value, gradient, first, second, steps)


def _adam(
    settings: CohortOptimizer,
    value: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
) -> None:
    _adam_step(
        settings, value, gradient.add(value, alpha=settings.weight_decay), first, second, steps
    )


def _adam_step(
    settings: CohortOptimizer,
    value: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
) -> None:
    first.lerp_(gradient, 1 - _BETA1)
    second.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
    # The corrections are small differences of numbers near 1: float64, then the dtype of the
    # values.
    step_size, second_share = (
        (settings.learning_rate / (1 - _BETA1**steps)),
        (1 - _BETA2**steps).sqrt(),
    )
    denominator = second.sqrt().div_(second_share.to(value.dtype)).add_(_EPSILON)
    value.sub_(first / denominator * step_size.to(value.dtype))


def _sgd(
    settings: CohortOptimizer,
    value: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
) -> None:
    value.sub_(gradient.add(value, alpha=settings.weight_decay), alpha=settings.learning_rate)


def _sophia(
    settings: CohortOptimizer,
    value: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
) -> Tensor:
    value.mul_(1 - settings.learning_rate * settings.weight_decay)
    first.lerp_(gradient, 1 - _SOPHIA_BETA1)
    move = first / (second * settings.gamma).clamp_(min=_SOPHIA_EPSILON)
    clipped: Tensor = (move.abs() > settings.rho).sum(dim=1)
    value.sub_(move.clamp_(-settings.rho, settings.rho), alpha=settings.learning_rate)
    return clipped


OPTIMIZERS: dict[
    str, Callable[[CohortOptimizer, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor | None]
] = {
    "adamw": _adamw,
    "adam": _adam,
    "sgd": _sgd,
    "sophia": _sophia,
    "zeroth-order": _sgd,
}
