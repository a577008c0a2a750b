"""Local training of a cohort: every client of the round takes its steps on one resident base model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmira.adapters import Adapter, all_finite
from fedmira.config import LocalSettings
from fedmira.model.base_model import BaseModel, TargetModule
from fedmira.model.lora import LoraBranch, StackedAdapters
from fedmira.model.loss import response_losses
from fedmira.model.optimizers import CohortOptimizer, Moments, clip_rows
from fedmira.model.packing import Row
from fedmira.model.token_budget import within_memory

__all__ = ["LocalOutcome", "LocalTask", "batch_indices", "count_steps", "train_cohort"]

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


def train_cohort(
    base: BaseModel, targets: Sequence[TargetModule], tasks: Sequence[LocalTask], settings: LocalSettings, dropout: float, budget: int
) -> list[LocalOutcome]:
    """Train all tasks side by side; each result is what plain PEFT training of that client alone gives, to float rounding.

    Args:
        dropout: of the LoRA branch; the frozen base never drops anything. Rows then share no prefix, so that each draws its own;
            which draws a client gets depends on its own rows and on `budget`, never on who shares its cohort.
        budget: most token positions in one forward pass; lowered when memory runs out.

    Returns:
        One outcome per task, in order. A client whose loss, gradient or adapter becomes non-finite stops and is reported.
    """
    cohort = _Cohort(base, targets, tasks, settings, dropout, budget)
    with LoraBranch(base.model, cohort.stacked, dropout, cohort.generators) as branch:
        while cohort.step(branch):
            pass
    return cohort.outcomes()


class _Cohort:
    """The moving parts of `train_cohort`: stacked adapters, moments, batches and figures of K clients.

    Figures stay on the device until the last step, so that no step waits for it.
    """

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
        self.generators = [torch.Generator().manual_seed(task.seed ^ 0x5EED) for task in tasks] if dropout else []
        self.alive = torch.ones(len(tasks), dtype=torch.bool, device=base.device)
        self.failed_in_step = torch.zeros(len(tasks), dtype=torch.long, device=base.device)
        self.sums: list[Tensor] = []
        self.counts: list[dict[int, int]] = []
        self.tokens = [0] * len(tasks)

    def step(self, branch: LoraBranch) -> bool:
        """One local step of every client that has a batch left; False when nobody has."""
        # Asking a device who has failed would wait for it: there, failed clients run on beside the others without moving.
        going = self.alive.tolist() if self.base.device.type == "cpu" else [True] * len(self.tasks)
        batches = {
            client: [self.tasks[client].rows[index] for index in chosen]
            for client in range(len(self.tasks))
            if going[client]
            for chosen in [next(self.batches[client], None)]
            if chosen
        }
        if not batches:
            return False
        states = [generator.get_state() for generator in self.generators]

        def backward(budget: int) -> Tensor:
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)
            return self._backward(branch, batches, budget)

        sums, self.budget = within_memory(backward, self.budget)
        self.sums.append(sums)
        self._stop_the_failed(batches, sums)
        for client in batches:
            self._apply_hook(client)
        clip_rows(self.stacked.gradients, self.settings.max_grad_norm)
        active = torch.tensor(list(batches), device=self.base.device)
        self.optimizer.step(self.stacked.values, self.stacked.gradients, self.moments, active)
        return True

    def outcomes(self) -> list[LocalOutcome]:
        """The clients' results after the last step."""
        sums = torch.stack(self.sums).tolist()
        failed = self.failed_in_step.tolist()
        return [
            self._outcome(
                client, [(sums[i][client], count[client]) for i, count in enumerate(self.counts) if client in count], failed[client]
            )
            for client in range(len(self.tasks))
        ]

    def _outcome(self, client: int, losses: list[tuple[float, int]], failed_in_step: int) -> LocalOutcome:
        adapter = self.stacked.adapter(client)
        failure = ""
        if failed_in_step:
            losses = losses[:failed_in_step]
            what = "gradient" if math.isfinite(losses[-1][0]) else "loss"
            failure = (
                f"non-finite {what} at local step {failed_in_step} (learning_rate {self.settings.learning_rate:g}); lower "
                "local.learning_rate or set local.max_grad_norm"
            )
        elif not all_finite(adapter):
            failure = f"the adapter is not finite after local step {len(losses)} (learning_rate {self.settings.learning_rate:g})"
        tokens = sum(count for _, count in losses)
        kept = self._kept_moments(client) if self.settings.optimizer_state == "kept" and not failure else None
        return LocalOutcome(
            dict(self.tasks[client].start) if failure else adapter,
            failure,
            len(losses) - bool(failed_in_step),
            sum(loss for loss, _ in losses) / tokens,
            losses[0][0] / losses[0][1],
            losses[-1][0] / losses[-1][1],
            tokens,
            self.tokens[client],
            kept,
        )

    def _backward(self, branch: LoraBranch, batches: Mapping[int, list[Row]], budget: int) -> Tensor:
        """Each client's gradient of its own mean response loss, and the sums of its losses [K]; passes may share a client's batch."""
        counts = {client: sum(len(row.response) for row in rows) for client, rows in batches.items()}
        tokens = dict.fromkeys(batches, 0)
        weights = torch.tensor([1 / counts.get(client, 1) for client in range(len(self.tasks))], device=self.base.device)
        sums = torch.zeros(len(self.tasks), dtype=torch.float64, device=self.base.device)
        self.stacked.gradients.zero_()
        for losses in response_losses(self.base, branch, list(batches.items()), budget):
            (losses.values * weights[losses.clients]).sum().backward()  # type: ignore[no-untyped-call]
            sums.index_add_(0, losses.clients, losses.values.detach().double())
            for client, number in losses.num_tokens.items():
                tokens[client] += number
        self.counts.append(counts)
        for client, number in tokens.items():
            self.tokens[client] += number
        return sums

    def _stop_the_failed(self, batches: Mapping[int, list[Row]], sums: Tensor) -> None:
        """A client whose loss or gradient is not finite moves no more: its gradient is zero from here on."""
        good = torch.isfinite(self.stacked.gradients).all(dim=1) & torch.isfinite(sums)
        self.failed_in_step.masked_fill_(self.alive & ~good, len(self.sums))
        self.alive &= good
        self.stacked.gradients.masked_fill_(~self.alive[:, None], 0)

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
