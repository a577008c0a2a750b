"""What adapters are worth on rows.

Summed losses of many clients side by side, and the best of several adapters for each client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fedmira.adapters import Adapter
from fedmira.model.base.memory import PassLimit, within_memory
from fedmira.model.base.rows import Row
from fedmira.model.base.types import BaseModel, TargetModule
from fedmira.model.lora.branch import LoraBranch
from fedmira.model.lora.branches import Branch, Passes
from fedmira.model.lora.stack import StackedAdapters
from fedmira.model.packed.passes import response_losses

__all__ = [
    "Choice",
    "Contender",
    "Measure",
    "Measured",
    "choose_adapters",
    "choose_by",
    "measure_with",
    "row_losses_with",
    "summed_losses",
]

Measured = tuple[list[float], list[int], int]
"""The sum of each adapter's losses in nats, the tokens computed, and the budget.

Tokens are the positions that were computed for it; the budget is the one that sufficed.
"""

Measure = Callable[[Sequence[Adapter], Sequence[float], Sequence[Sequence[Row]], int], Measured]
"""(adapters, scales, rows of each, budget) -> what was measured."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A client and the adapters it may have.

    Attributes:
        adapters: at least one; of equals the first is taken, and without rows the last.
        scale: alpha / rank; 1 for adapters without a rank.
        rows: what they are measured on.
    """

    adapters: Sequence[Adapter]
    scale: float
    rows: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of its adapters a client takes, and each adapter's loss per response token.

    Between them stand the token positions that were computed to find out.

    Attributes:
        losses: infinite where they are not finite; empty where nothing was measured.
        index: of the adapter among the contenders.
        tokens: response tokens that were read.
    """

    index: int
    tokens: int = 0
    losses: tuple[float, ...] = ()


def summed_losses(
    base: BaseModel,
    targets: Sequence[TargetModule],
    adapters: Sequence[Adapter],
    scales: Sequence[float],
    rows: Sequence[Sequence[Row]],
    budget: int,
    limit: PassLimit | None = None,
) -> Measured:
    """The sum of the response losses of each adapter on its rows, without gradients.

    Args:
        adapters, scales, rows: of K clients that are measured side by side.
        budget: most token positions in one forward pass; lowered when memory runs out.
        limit: remembers for later calls how far it was lowered.
        base: the frozen base.
        targets: the linear layers that carry adapters, in the model's order.
    """
    branch = LoraBranch(
        base.model, StackedAdapters(targets, adapters, scales, base.device, trainable=False)
    )
    return measure_with(branch, partial(response_losses, base, branch), rows, budget, limit)


def measure_with(
    branch: Branch,
    passes: Passes,
    rows: Sequence[Sequence[Row]],
    budget: int,
    limit: PassLimit | None = None,
) -> Measured:
    """The same for adapters of any kind, which a branch holds: one for each client's rows.

    Args:
        branch: the adapters of the clients, as they are hooked into the layers.
        passes: how losses of batches are made.
        rows: each client's rows.
        budget: most tokens in a forward pass.
        limit: remembers a budget that memory allowed.
    """
    batches = list(enumerate(rows))
    with torch.no_grad(), branch:
        (losses, tokens), budget = within_memory(
            partial(_sums, passes, branch.adapters.values.device, batches), budget, limit
        )
    return losses, tokens, budget


def row_losses_with(
    branch: Branch,
    passes: Passes,
    rows: Sequence[Sequence[Row]],
    budget: int,
    limit: PassLimit | None = None,
) -> list[list[float]]:
    """The summed response loss of each row under its client's adapter, in nats.

    Args:
        branch: the adapters of the clients, as they are hooked into the layers.
        passes: how losses of batches are made.
        rows: each client's rows.
        budget: most tokens in a forward pass.
        limit: remembers a budget that memory allowed.
    """
    batches = list(enumerate(rows))
    with torch.no_grad(), branch:
        found, _ = within_memory(
            partial(_row_sums, passes, branch.adapters.values.device, batches), budget, limit
        )
    return found


def choose_adapters(
    base: BaseModel,
    targets: Sequence[TargetModule],
    contenders: Sequence[Contender],
    budget: int,
    limit: PassLimit | None = None,
) -> list[Choice]:
    """For each client the adapter with the lowest loss on its rows.

    Nothing is computed for clients with one adapter.

    All clients' first adapters are measured side by side, then their second ones, and so on. A loss
    that is not finite is the highest there is.

    Args:
        base: the frozen base.
        targets: the linear layers that carry adapters, in the model's order.
        contenders: each client's rows and the adapters to choose among.
        budget: most tokens in a forward pass.
        limit: remembers a budget that memory allowed.
    """
    return choose_by(partial(summed_losses, base, targets, limit=limit), contenders, budget)


def choose_by(measure: Measure, contenders: Sequence[Contender], budget: int) -> list[Choice]:
    """The same by any measure.

    Where memory ran out, the next adapters start with the budget that sufficed.

    Args:
        measure: gives summed losses of adapters on rows.
        contenders: each client's rows and the adapters to choose among.
        budget: most tokens in a forward pass.
    """
    found: list[list[float]] = [[] for _ in contenders]
    tokens = [0] * len(contenders)
    measured = [k for k, one in enumerate(contenders) if one.rows and len(one.adapters) > 1]
    for position in range(max((len(contenders[k].adapters) for k in measured), default=0)):
        turn = [k for k in measured if position < len(contenders[k].adapters)]
        adapters = [contenders[k].adapters[position] for k in turn]
        scales, rows = [contenders[k].scale for k in turn], [contenders[k].rows for k in turn]
        losses, computed, budget = measure(adapters, scales, rows, budget)
        for k, loss, count in zip(turn, losses, computed, strict=True):
            tokens[k] += count
            found[k].append(
                loss / sum(len(row.response) for row in contenders[k].rows)
                if math.isfinite(loss)
                else math.inf
            )
    return [
        Choice(
            losses.index(min(losses)) if losses else 0 if one.rows else len(one.adapters) - 1,
            count,
            tuple(losses),
        )
        for one, losses, count in zip(contenders, found, tokens, strict=True)
    ]


def _sums(
    passes: Passes, device: torch.device, batches: Sequence[tuple[int, Sequence[Row]]], budget: int
) -> tuple[list[float], list[int]]:
    """Of each batch the sum of its losses, and its token positions."""
    totals = torch.zeros(len(batches), dtype=torch.float64, device=device)
    tokens = [0] * len(batches)
    for losses in passes(batches, budget):
        totals.index_add_(0, losses.clients, losses.values.double())
        for client, count in losses.num_tokens.items():
            tokens[client] += count
    return totals.tolist(), tokens


def _row_sums(
    passes: Passes, device: torch.device, batches: Sequence[tuple[int, Sequence[Row]]], budget: int
) -> list[list[float]]:
    """Of each batch the sum of losses of each row."""
    sizes = [len(rows) for _, rows in batches]
    first = torch.tensor([0, *sizes[:-1]], device=device).cumsum(0)
    totals = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
    for losses in passes(batches, budget):
        totals.index_add_(0, first[losses.clients] + losses.rows, losses.values.double())
    values = iter(totals.tolist())
    return [[next(values) for _ in range(size)] for size in sizes]
