"""Local training of a cohort.

Every client of the round takes its steps on one resident base model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fedmira.adapters import Adapter, all_finite
from fedmira.config import LocalSettings
from fedmira.model.base.memory import PassLimit, within_memory
from fedmira.model.base.rows import Row
from fedmira.model.base.transfer import on_device, sent
from fedmira.model.base.types import BaseModel, TargetModule
from fedmira.model.lora.branch import LoraBranch
from fedmira.model.lora.branches import (
    Branch,
    Draws,
    Passes,
    TokenLosses,
)
from fedmira.model.lora.stack import StackedAdapters
from fedmira.model.packed.passes import response_losses
from fedmira.model.training.advantages import RowFactors, step_weights
from fedmira.model.training.curvature import TargetDraws, response_tokens, without_dropout
from fedmira.model.training.optimizers import (
    CohortOptimizer,
    Moments,
    add_curvature,
    clip_rows,
)
from fedmira.model.training.private import PrivateSteps, batches_of
from fedmira.model.training.squares import SquaredGradients
from fedmira.model.training.tasks import LocalOutcome, LocalTask
from fedmira.model.training.zeroth_order import RandomSlopes

__all__ = ["train_cohort", "train_with"]


def train_cohort(
    base: BaseModel,
    targets: Sequence[TargetModule],
    tasks: Sequence[LocalTask],
    settings: LocalSettings,
    dropout: float,
    budget: int,
    limit: PassLimit | None = None,
) -> list[LocalOutcome]:
    """Train all tasks side by side.

    Each result is what plain PEFT training of that client alone gives, to float rounding.

    Args:
        dropout: of the LoRA branch; the frozen base never drops anything. Rows then share no
            prefix, so that each draws its own; which draws a client gets depends on its own rows
            and on `budget`, never on who shares its cohort.
        budget: most token positions in one forward pass; lowered when memory runs out.
        limit: remembers for later cohorts how far it was lowered.
        base: the frozen base.
        targets: the linear layers that carry adapters, in the model's order.
        tasks: clients with their adapters and rows.
        settings: the [local] section.

    Returns:
        One outcome per task, in order. A client whose loss, gradient or adapter becomes non-finite
        stops and is reported.
    """
    stacked = StackedAdapters(
        targets, [task.start for task in tasks], [task.scale for task in tasks], base.device
    )
    generators = (
        [torch.Generator(base.device).manual_seed(task.seed ^ 0x5EED) for task in tasks]
        if dropout
        else []
    )
    branch = LoraBranch(base.model, stacked, dropout, generators)
    return train_with(
        branch, partial(response_losses, base, branch), tasks, settings, budget, limit
    )


def train_with(
    branch: Branch,
    passes: Passes,
    tasks: Sequence[LocalTask],
    settings: LocalSettings,
    budget: int,
    limit: PassLimit | None = None,
) -> list[LocalOutcome]:
    """Train the adapters of any kind that a branch holds, one a task.

    Args:
        branch: of the tasks' start adapters, with gradients.
        passes: forward passes with that branch.
        budget: most token positions in one of them; lowered when memory runs out.
        limit: remembers for later cohorts how far it was lowered.
        tasks: clients with their adapters and rows.
        settings: the [local] section.

    Returns:
        One outcome per task, in order.
    """
    cohort = _Cohort(branch, passes, tasks, settings, budget, limit or PassLimit())
    with branch:
        while cohort.step():
            pass
    return cohort.outcomes()


class _Cohort:
    """The moving parts of `train_with`.

    Stacked adapters, moments, batches and figures of K clients.

    Figures stay on the device until the last step, so that no step waits for it.
    """

    def __init__(
        self,
        branch: Branch,
        passes: Passes,
        tasks: Sequence[LocalTask],
        settings: LocalSettings,
        budget: int,
        limit: PassLimit,
    ) -> None:
        self.branch, self.passes, self.tasks = branch, passes, tasks
        self.settings, self.budget, self.limit = settings, budget, limit
        self.stacked = branch.adapters
        self.device = self.stacked.values.device
        self.optimizer = CohortOptimizer(
            settings.optimizer,
            settings.learning_rate,
            settings.weight_decay,
            settings.sophia_gamma,
            settings.sophia_rho,
        )
        self.moments = self._initial_moments()
        self.ratios = (
            self.stacked.ratios(settings.lora_plus_ratio)
            if settings.lora_plus_ratio != 1 and isinstance(self.stacked, StackedAdapters)
            else None
        )
        seeds = [task.seed for task in tasks]
        self.private = PrivateSteps.of(self.stacked, [task.privacy for task in tasks], seeds)
        rows = [len(task.rows) for task in tasks]
        self.batches = batches_of(self.private, rows, settings, seeds)
        self.alive = torch.ones(len(tasks), dtype=torch.bool, device=self.device)
        self.failed_in_step = torch.zeros(len(tasks), dtype=torch.long, device=self.device)
        self.sums: list[Tensor] = []
        self.counts: list[dict[int, int]] = []
        self.tokens = [0] * len(tasks)
        self.clipped = torch.zeros(len(tasks), dtype=torch.long, device=self.device)
        self.squares = SquaredGradients(
            self.stacked, [len(task.rows) if task.squares else None for task in tasks]
        )
        self.target_draws = TargetDraws([task.seed for task in tasks])
        self.weights: dict[int, list[float]] = {}
        self.steps_before = [task.moments[2] if task.moments else 0 for task in tasks]
        self.slopes: RandomSlopes | None = None
        if settings.optimizer == "zeroth-order":
            self.slopes = RandomSlopes(
                self.stacked,
                [task.seed for task in tasks],
                settings.zeroth_seeds,
                settings.zeroth_width,
            )

    def step(self) -> bool:
        """One local step of every client that has a batch left; False when nobody has."""
        # Asking a device who has failed would wait for it: there, failed clients run on beside the
        # others without moving.
        going = self.alive.tolist() if self.device.type == "cpu" else [True] * len(self.tasks)
        drawn = {
            client: chosen
            for client in range(len(self.tasks))
            if going[client]
            for chosen in [next(self.batches[client], None)]
            if chosen or (self.private and chosen is not None)  # a private batch may be empty
        }
        if not drawn:
            return False
        batches = {
            client: [self.tasks[client].rows[index] for index in chosen]
            for client, chosen in drawn.items()
        }
        temperature = self.settings.advantage_temperature
        self.weights = step_weights([task.advantages for task in self.tasks], drawn, temperature)
        good = (
            self._refresh_curvature(batches) if self.settings.optimizer == "sophia" else self.alive
        )
        if self.slopes is not None:
            self.slopes.draw(list(batches))
        states = [generator.get_state() for generator in self.branch.generators]

        def backward(budget: int) -> Tensor:
            for generator, state in zip(self.branch.generators, states, strict=True):
                generator.set_state(state)
            return self._backward(batches, budget)

        sums, _ = within_memory(backward, self.budget, self.limit)
        self.sums.append(sums)
        if self.private:
            self.private.add_noise(list(batches))
        self._stop_the_failed(good & torch.isfinite(sums))
        self.squares.add(self._sizes(batches))  # while gradients are still those of the loss alone
        for client in batches:
            self._apply_hook(client)
        shares = clip_rows(self.stacked.gradients, self.settings.max_grad_norm)
        if self.slopes is not None:
            rates = self._rates(range(len(self.tasks)))
            shares = shares if rates is None else shares * rates
            self.slopes.note(shares, self.settings.learning_rate)
        active = on_device(list(batches), self.device)
        clipped = self.optimizer.step(
            self.stacked.values,
            self.stacked.gradients,
            self.moments,
            active,
            self._shares(list(batches)),
        )
        if clipped is not None:
            self.clipped.index_add_(0, active, clipped)
        for client in batches:
            self._settle(client)
        return True

    def _sizes(self, batches: Mapping[int, list[Row]]) -> dict[int, int]:
        """How many rows each batch has; of private ones how many it has on average."""
        if self.private:
            return self.private.sizes(list(batches))
        return {client: len(rows) for client, rows in batches.items()}

    def _rates(self, clients: Sequence[int]) -> Tensor | None:
        """Each client's share of the learning rate in this step, [n]; None where all are 1."""
        if all(self.tasks[client].rates is None for client in clients):
            return None
        step = len(self.sums) - 1
        rates = [self.tasks[client].rates or () for client in clients]
        return on_device([each[step] if step < len(each) else 1.0 for each in rates], self.device)

    def _shares(self, clients: Sequence[int]) -> Tensor | None:
        """By what share of the learning rate each entry moves, [n, P] or [n, 1]; None: all by 1."""
        rates = self._rates(clients)
        if rates is None:
            return None if self.ratios is None else self.ratios[None, :].expand(len(clients), -1)
        return rates[:, None] if self.ratios is None else rates[:, None] * self.ratios[None, :]

    def outcomes(self) -> list[LocalOutcome]:
        """The clients' results after the last step."""
        sums = torch.stack(self.sums).tolist()
        failed = self.failed_in_step.tolist()
        return [
            self._outcome(
                client,
                [
                    (sums[i][client], count[client])
                    for i, count in enumerate(self.counts)
                    if client in count
                ],
                failed[client],
            )
            for client in range(len(self.tasks))
        ]

    def _outcome(
        self, client: int, losses: list[tuple[float, int]], failed_in_step: int
    ) -> LocalOutcome:
        adapter = self.stacked.adapter(client)
        failure = ""
        if failed_in_step:
            losses = losses[:failed_in_step]
            what = "gradient" if math.isfinite(losses[-1][0]) else "loss"
            failure = (
                f"non-finite {what} at local step {failed_in_step} (learning_rate "
                f"{self.settings.learning_rate:g}); lower "
                "local.learning_rate or set local.max_grad_norm"
            )
        elif not all_finite(adapter):
            failure = (
                f"the adapter is not finite after local step {len(losses)} "
                f"(learning_rate {self.settings.learning_rate:g})"
            )
        tokens = sum(count for _, count in losses)
        kept = (
            self._kept_moments(client)
            if self.settings.optimizer_state == "kept" and not failure
            else None
        )
        return LocalOutcome(
            dict(self.tasks[client].start) if failure else adapter,
            failure,
            len(losses) - bool(failed_in_step),
            sum(loss for loss, _ in losses) / (tokens or 1),
            losses[0][0] / (losses[0][1] or 1),
            losses[-1][0] / (losses[-1][1] or 1),
            tokens,
            self.tokens[client],
            kept,
            self._clip_share(client, len(losses)) if self.settings.optimizer == "sophia" else None,
            self.slopes.movement(client) if self.slopes is not None and not failure else None,
            self.squares.of(client) if not failure else None,
        )

    def _clip_share(self, client: int, num_steps: int) -> float:
        """Share of the client's own entries, padding left out, whose step was clipped."""
        entries = sum(tensor.numel() for tensor in self.tasks[client].start.values())
        return int(self.clipped[client]) / (entries * num_steps)

    def _backward(self, batches: Mapping[int, list[Row]], budget: int) -> Tensor:
        """Each client's gradient of its own mean response loss, and the sums of losses [K].

        A method may put something else in the gradient's place.
        """
        if self.private:
            sums = self.private.clipped(batches, lambda part: self._gradients(part, budget))
        elif self.slopes is None:
            sums = self._gradients(batches, budget)
        else:
            sums = self.slopes.measure(lambda: self._losses(batches, budget), batches)
        self.counts.append(response_tokens(batches))
        return sums

    def _gradients(
        self, batches: Mapping[int, list[Row]], budget: int, draws: Draws | None = None
    ) -> Tensor:
        """Fill `stacked.gradients`, of drawn targets where there are draws.

        Sums of losses [K]. Passes may share a client's batch.
        """
        counts = response_tokens(batches)
        weights = on_device(
            [1 / counts.get(client, 1) for client in range(len(self.tasks))], self.device
        )
        sums = torch.zeros(len(self.tasks), dtype=torch.float64, device=self.device)
        # What is drawn from the model tells the curvature of all rows alike.
        factors = RowFactors(batches, self.weights if draws is None else {}, self.device)
        self.stacked.gradients.zero_()
        for losses in self._passes(batches, budget, draws):
            of = factors.of(losses)
            shares = of.float() * weights[losses.clients]
            (losses.values * shares).sum().backward()  # type: ignore[no-untyped-call]
            sums.index_add_(0, losses.clients, losses.values.detach().double() * of)
        return sums

    def _losses(self, batches: Mapping[int, list[Row]], budget: int) -> Tensor:
        """Sums of losses alone."""
        sums = torch.zeros(len(self.tasks), dtype=torch.float64, device=self.device)
        factors = RowFactors(batches, self.weights, self.device)
        with torch.no_grad():
            for losses in self._passes(batches, budget):
                sums.index_add_(0, losses.clients, losses.values.double() * factors.of(losses))
        return sums

    def _passes(
        self, batches: Mapping[int, list[Row]], budget: int, draws: Draws | None = None
    ) -> Iterator[TokenLosses]:
        """Pass over the batches; tokens count when no pass ran out of memory."""
        tokens = dict.fromkeys(batches, 0)
        for losses in self.passes(list(batches.items()), budget, draws):
            for client, number in losses.num_tokens.items():
                tokens[client] += number
            yield losses
        for client, number in tokens.items():
            self.tokens[client] += number

    def _refresh_curvature(self, batches: Mapping[int, list[Row]]) -> Tensor:
        """Estimate Sophia's curvature anew for the clients whose turn it is.

        At the adapters and batches of the step to come.

        A client's turn comes every `sophia_refresh` of its own steps, the first included, wherever
        its kept state left off.

        Returns:
            Who still has finite figures, bool [K].
        """
        taken = len(self.sums)  # by every client that still takes part
        turn = self.settings.sophia_refresh
        due = {
            client: rows
            for client, rows in batches.items()
            if (self.steps_before[client] + taken) % turn == 0
        }
        if not due:
            return self.alive
        draws = self.target_draws.of(due)
        with without_dropout(self.branch):
            within_memory(
                lambda budget: self._gradients(due, budget, draws), self.budget, self.limit
            )
        clients, tokens = (
            on_device(list(part), self.device) for part in (due, response_tokens(due).values())
        )
        add_curvature(self.moments, self.stacked.gradients, clients, tokens)
        return torch.isfinite(self.moments.second).all(dim=1)

    def _stop_the_failed(self, good: Tensor) -> None:
        """A client whose loss (see `good`, [K]) or gradient is not finite moves no more.

        Its gradient is zero from here on.
        """
        good = torch.isfinite(self.stacked.gradients).all(dim=1) & good
        self.failed_in_step.masked_fill_(self.alive & ~good, len(self.sums))
        self.alive &= good
        self.stacked.gradients.masked_fill_(~self.alive[:, None], 0)

    def _apply_hook(self, client: int) -> None:
        hook = self.tasks[client].hook
        if hook is None:
            return
        gradient = self.stacked.views(self.stacked.gradients, client)
        for name, changed in hook(
            gradient, self.stacked.views(self.stacked.values, client)
        ).items():
            gradient[name].copy_(changed)

    def _settle(self, client: int) -> None:
        settle = self.tasks[client].settle
        if settle is None:
            return
        parameters = self.stacked.views(self.stacked.values, client)
        for name, changed in settle(parameters).items():
            parameters[name].copy_(changed)

    def _initial_moments(self) -> Moments:
        """Those kept of each client's last round, sent to the device in one piece."""
        if all(task.moments is None for task in self.tasks):
            return Moments.empty(self.stacked.values)
        moments = Moments.empty(torch.empty_like(self.stacked.values, device="cpu"))
        for client, task in enumerate(self.tasks):
            if task.moments is not None:
                first, second, steps = task.moments
                for part, kept in ((moments.first, first), (moments.second, second)):
                    for name, view in self.stacked.views(part, client).items():
                        view.copy_(kept[name])
                moments.steps[client] = steps
        return Moments(
            *(sent(part, self.device) for part in (moments.first, moments.second, moments.steps))
        )

    def _kept_moments(self, client: int) -> tuple[Adapter, Adapter, int]:
        first, second = (
            self.stacked.copied(part, client) for part in (self.moments.first, self.moments.second)
        )
        return first, second, int(self.moments.steps[client])
