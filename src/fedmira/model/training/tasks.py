"""What one client trains on in one round, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedmira.adapters import Adapter
from fedmira.model.base.rows import Row
from fedmira.model.training.private import RowPrivacy

__all__ = ["Hook", "LocalOutcome", "LocalTask", "Settle"]

Hook = Callable[[Adapter, Adapter], Adapter]
Settle = Callable[[Adapter], Adapter]


@dataclass(frozen=True, slots=True)
class LocalTask:
    """What one client trains on in one round.

    Attributes:
        start: its adapter.
        scale: alpha / rank; 1 for adapters without a rank.
        rows: its training rows.
        seed: of its batches, dropout and drawn targets in this round.
        hook: turns (gradient, parameters) into the gradient to step with, or None.
        moments: (first, second, steps) kept from its last round, named as the adapter is, or None
            to start fresh.
        rates: share of the learning rate of each of its steps; None where all are 1.
        settle: turns the parameters that a step left into those of them that are to be others, by
            name, or None.
        advantages: of each row, finite; None where all rows weigh alike.
        squares: whether squares of gradients are added up.
        privacy: how each row is hidden; None hides none. All tasks of a cohort have it, or none.
    """

    start: Adapter
    scale: float
    rows: Sequence[Row]
    seed: int
    hook: Hook | None = None
    moments: tuple[Adapter, Adapter, int] | None = None
    rates: tuple[float, ...] | None = None
    settle: Settle | None = None
    advantages: Sequence[float] | None = None
    squares: bool = False
    privacy: RowPrivacy | None = None


@dataclass(frozen=True, slots=True)
class LocalOutcome:
    """What came of it: an adapter with its figures, or the reason why there is none.

    Attributes:
        failure: "" or why the result must not be used; the adapter is then the start.
        loss: nats per response token over all steps, rows weighted as in training.
        response_tokens, tokens: tokens that carried loss, and token positions computed.
        clip_share: of optimizer "sophia", the share of entries whose step was clipped, over all
            steps; None with the others.
        movement: of optimizer "zeroth-order", all its steps as seeds and coefficients; None with
            the others.
        adapter: the trained tensors.
        num_steps: steps that were taken.
        first_loss, last_loss: that of the first and of the last step.
        moments: first and second moment and the steps behind them; None where none are kept.
        squares: the sum over the batches of |b| / n times the squared gradient of the mean loss of
            a batch of |b| of the n rows; None where nobody asked.
    """

    adapter: Adapter
    failure: str
    num_steps: int
    loss: float
    first_loss: float
    last_loss: float
    response_tokens: int
    tokens: int
    moments: tuple[Adapter, Adapter, int] | None = None
    clip_share: float | None = None
    movement: Adapter | None = None
    squares: Adapter | None = None
