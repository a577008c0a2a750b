"""Local training of a cohort: every client of the round takes its steps on one resident base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmira.adapters import Adapter
from fedmira.config import LocalSettings
from fedmira.model.base_model import BaseModel, TargetModule
from fedmira.model.lora import LoraBranch, StackedAdapters
from fedmira.model.loss import response_losses
from fedmira.model.optimizers import CohortOptimizer, Moments, clip_rows
from fedmira.model.packing import Row

__all__ = ["LocalOutcome", "LocalTask", "batch_indices", "choose_token_budget", "count_steps", "train_cohort"]

_CPU_BUDGET, _ACCELERATOR_BUDGET = 2048, 16384

Hook = Callable[[Adapter, Adapter], Adapter]


@dataclass(frozen=True, slots=True)
class LocalTask:
    """What one client trains on in one round.

    Attributes:
        start: its adapter; `scale` is alpha / rank.
        rows: its training rows.
        seed: of its batches and dropout in this round.
        hook: turns (gradient, parameters) into the gradient to step with, or None.
        moments: (first, second, steps) kept from its last round, flat as `StackedAdapters` lays them out, or None to start fresh.
    """

    start: Adapter
    scale: float
    rows: Sequence[Row]
    seed: int
    hook: Hook | None = None
    moments: tuple[Adapter, Adapter, int] | None = None


@dataclass(frozen=True, slots=True)
class LocalOutcome:
    """What came of it: an adapter with its figures, or the reason why there is none.

    Attributes:
        failure: "" or why the result must not be used; the adapter is then the start.
        loss: nats per response token over all steps; `first_loss` and `last_loss` of the first and last step.
        response_tokens, tokens: tokens that carried loss, and token positions computed.
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


def batch_indices(num_rows: int, settings: LocalSettings, seed: int) -> Iterator[list[int]]:
    """The row numbers of each local step's batch.

    With `epochs`, every epoch is a new order cut into batches, the last one shorter. With `steps`, orders follow one another
    without a cut. A batch is never larger than the client's rows.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(settings.batch_size, num_rows)
    if settings.epochs:
        for _ in range(settings.epochs):
            order = torch.randperm(num_rows, generator=generator).tolist()
            yield from (order[start : start + size] for start in range(0, num_rows, size))
        return
    pool: list[int] = []
    for _ in range(settings.steps):
        while len(pool) < size:
            pool += torch.randperm(num_rows, generator=generator).tolist()
        yield pool[:size]
        pool = pool[size:]


def count_steps(num_rows: int, settings: LocalSettings) -> int:
    """Number of local steps a client with so many rows takes in a round."""
    if not settings.epochs:
        return settings.steps
    size = min(settings.batch_size, num_rows)
    return settings.epochs * -(-num_rows // size)


def choose_token_budget(base: BaseModel) -> int:
    """Token positions in one forward pass: few on a CPU, where a small working set stays in the cache; many on an accelerator."""
    return _CPU_BUDGET if base.device.type == "cpu" else _ACCELERATOR_BUDGET


def train_cohort(
    base: BaseModel, targets: Sequence[TargetModule], tasks: Sequence[LocalTask], settings: LocalSettings, dropout: float, budget: int
) -> list[LocalOutcome]:
    """Train all tasks side by side; each result is what plain PEFT training of that client alone gives, to float rounding.

    Args:
        dropout: of the LoRA branch; the frozen base never drops anything. Rows then share no prefix, so that each draws its own;
            which draws a client gets depends on its own rows and on `budget`, never on who shares its cohort.
        budget: most token positions in one forward pass.

    Returns:
        One outcome per task, in order. A client whose loss, gradient or adapter becomes non-finite stops and is reported.
    """
    cohort = _Cohort(base, targets, tasks, settings, dropout, budget)
    with LoraBranch(base.model, cohort.stacked, dropout, cohort.generators) as branch:
        while cohort.step(branch):
            pass
    return [cohort.outcome(client) for client in range(len(tasks))]


class _Cohort:
    """The moving parts of `train_cohort`: stacked adapters, moments, batches and figures of K clients."""

    def __init__(
        self,
        base: BaseModel,
        targets: Sequence[TargetModule],
        tasks: Sequence[LocalTask],
        settings: LocalSettings,
        dropout: float,
        budget: int,
    ) -> None:
        self.base, self.tasks, self.settings, self.budget = base, tasks, settings, budget
        self.stacked = StackedAdapters(targets, [task.start for task in tasks], [task.scale for task in tasks], base.device)
        self.optimizer = CohortOptimizer(settings.optimizer, settings.learning_rate, settings.weight_decay)
        self.moments = self._initial_moments()
        self.batches = [batch_indices(len(task.rows), settings, task.seed) for task in tasks]
        self.generators = [torch.Generator().manual_seed(task.seed ^ 0x5EED) for task in tasks]
        self.failures = [""] * len(tasks)
        self.steps = [0] * len(tasks)
        self.losses: list[list[tuple[float, int]]] = [[] for _ in tasks]
        self.tokens = [0.0] * len(tasks)

    def step(self, branch: LoraBranch) -> bool:
        """One local step of every client that has a batch left; False when nobody has."""
        batches = {
            client: self._rows(client, chosen)
            for client in range(len(self.tasks))
            if not self.failures[client]
            for chosen in [next(self.batches[client], None)]
            if chosen
        }
        if not batches:
            return False
        self.stacked.gradients.zero_()
        self._backward(branch, batches)
        active = self._healthy(batches)
        if active:
            for client in active:
                self._apply_hook(client)
            clip_rows(self.stacked.gradients, self.settings.max_grad_norm)
            self.optimizer.step(self.stacked.values, self.stacked.gradients, self.moments, torch.tensor(active, device=self.base.device))
        for client in active:
            self.steps[client] += 1
        return True

    def outcome(self, client: int) -> LocalOutcome:
        """The client's result after its last step."""
        failure = self.failures[client]
        adapter = self.stacked.adapter(client)
        if not failure and not all(bool(torch.isfinite(tensor).all()) for tensor in adapter.values()):
            failure = f"the adapter is not finite after local step {self.steps[client]} (learning_rate {self.settings.learning_rate:g})"
        losses = self.losses[client]
        total, tokens = sum(loss for loss, _ in losses), sum(count for _, count in losses)
        per_step = [loss / count for loss, count in losses]
        kept = self._kept_moments(client) if self.settings.optimizer_state == "kept" and not failure else None
        start = self.tasks[client].start
        return LocalOutcome(
            dict(start) if failure else adapter,
            failure,
            self.steps[client],
            total / tokens,
            per_step[0],
            per_step[-1],
            tokens,
            round(self.tokens[client]),
            kept,
        )

    def _rows(self, client: int, chosen: list[int]) -> list[Row]:
        return [self.tasks[client].rows[index] for index in chosen]

    def _backward(self, branch: LoraBranch, batches: Mapping[int, list[Row]]) -> None:
        """Add each client's gradient of its own mean response loss; several passes may share a client's batch."""
        counts = torch.ones(len(self.tasks), device=self.base.device)
        for client, rows in batches.items():
            counts[client] = sum(len(row.response) for row in rows)
        totals = torch.zeros(len(self.tasks), dtype=torch.float64)
        for losses in response_losses(self.base, branch, list(batches.items()), self.budget):
            (losses.values / counts[losses.clients]).sum().backward()  # type: ignore[no-untyped-call]
            owners = losses.clients.cpu()
            totals.index_add_(0, owners, losses.values.detach().cpu().double())
            shares = torch.bincount(owners, minlength=len(self.tasks)).double()
            for client, share in enumerate((shares / shares.sum()).tolist()):
                self.tokens[client] += share * losses.num_tokens
        sums, sizes = totals.tolist(), counts.tolist()
        for client in batches:
            self.losses[client].append((sums[client], int(sizes[client])))

    def _healthy(self, batches: Mapping[int, list[Row]]) -> list[int]:
        """The clients whose loss and gradient are finite; the others are stopped and their gradient is dropped."""
        finite: Tensor = torch.isfinite(self.stacked.gradients).all(dim=1)
        healthy = []
        for client, good in enumerate(finite.tolist()):
            if client not in batches:
                continue
            loss = self.losses[client][-1][0]
            if good and loss == loss and abs(loss) != float("inf"):
                healthy.append(client)
                continue
            what = "gradient" if loss == loss and abs(loss) != float("inf") else "loss"
            self.failures[client] = (
                f"non-finite {what} at local step {self.steps[client] + 1} (learning_rate {self.settings.learning_rate:g}); lower "
                "local.learning_rate or set local.max_grad_norm"
            )
            self.stacked.gradients[client] = 0
        return healthy

    def _apply_hook(self, client: int) -> None:
        hook = self.tasks[client].hook
        if hook is None:
            return
        gradient = self.stacked.views(self.stacked.gradients, client)
        for name, changed in hook(gradient, self.stacked.views(self.stacked.values, client)).items():
            gradient[name].copy_(changed)

    def _initial_moments(self) -> Moments:
        moments = Moments.empty(self.stacked.values)
        for client, task in enumerate(self.tasks):
            if task.moments is not None:
                first, second, steps = task.moments
                for part, kept in ((moments.first, first), (moments.second, second)):
                    for name, view in self.stacked.views(part, client).items():
                        view.copy_(kept[name])
                moments.steps[client] = steps
        return moments

    def _kept_moments(self, client: int) -> tuple[Adapter, Adapter, int]:
        first, second = (
            {name: view.detach().cpu().clone() for name, view in self.stacked.views(part, client).items()}
            for part in (self.moments.first, self.moments.second)
        )
        return first, second, int(self.moments.steps[client])
