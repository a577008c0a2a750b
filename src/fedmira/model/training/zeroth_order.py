"""Training without a backward pass: slopes along random directions, from two forward passes each.

    g = (f(w + e z) - f(w - e z)) / (2 e)        z standard normal, made from a seed
    w <- w - lr g z

Spall 1992; for language models MeZO (Malladi et al. 2023, arXiv 2305.17333). The seeds come from a
fixed set of candidates, as in FedKSeed (Qin et al. 2024, arXiv 2312.06353), so a whole round is a
handful of numbers: -lr g, summed by seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedmira.adapters import Adapter
from fedmira.adapters.directions import direction, movement
from fedmira.model.base.rows import Row
from fedmira.model.base.transfer import on_device, sent
from fedmira.model.lora.branches import Stack
from fedmira.model.training.curvature import response_tokens

__all__ = ["RandomSlopes"]


class RandomSlopes:
    """The slopes of a cohort, each client with candidates from a stream of its own.

    So nobody depends on who shares the cohort.

    Args:
        stacked: the cohort's adapters; its gradients receive g z.
        seeds: of the clients in this round.
        candidates: seeds are drawn from 0 to this number, exclusive.
        width: e, how far the adapter is moved to either side.
    """

    def __init__(self, stacked: Stack, seeds: Sequence[int], candidates: int, width: float) -> None:
        self._stacked, self._candidates, self._width = stacked, candidates, width
        self._generators = [torch.Generator().manual_seed(seed ^ 0x5EED5) for seed in seeds]
        self._directions = torch.zeros_like(stacked.values)
        self._chosen: dict[int, int] = {}
        self._slopes = torch.zeros(len(stacked), dtype=torch.float64)
        self._steps: list[tuple[dict[int, int], Tensor]] = []

    def draw(self, clients: Sequence[int]) -> None:
        """A new direction for these clients; the others get none."""
        self._directions.zero_()
        self._chosen = {
            client: int(torch.randint(self._candidates, (1,), generator=self._generators[client]))
            for client in clients
        }
        for client, seed in self._chosen.items():
            views = self._stacked.views(self._directions, client)
            for name, part in direction(seed, views).items():
                views[name].copy_(sent(part, views[name].device))

    def measure(self, losses: Callable[[], Tensor], batches: Mapping[int, Sequence[Row]]) -> Tensor:
        """Put g z in the place of the gradients.

        Args:
            losses: sums of the clients' losses with the adapters as they are, float64 [K].
            batches: of the clients that take this step; g is of the mean over their response
                tokens.

        Returns:
            Sums of losses, the mean of both sides, float64 [K].
        """
        values = self._stacked.values
        centre, sides = values.clone(), []
        try:
            for sign in (1, -1):
                torch.add(centre, self._directions, alpha=sign * self._width, out=values)
                sides.append(losses())
        finally:
            values.copy_(centre)
        counts = response_tokens(batches)
        tokens = on_device(
            [counts.get(client, 1) for client in range(len(values))], values.device, torch.float64
        )
        self._slopes = (sides[0] - sides[1]) / (2 * self._width * tokens)
        torch.mul(
            self._directions, self._slopes.to(values.dtype)[:, None], out=self._stacked.gradients
        )
        return (sides[0] + sides[1]) / 2

    def note(self, shares: Tensor, learning_rate: float) -> None:
        """Remember the step that was taken.

        Args:
            shares: what clipping left of each client's gradient, [K].
            learning_rate: that of the step.
        """
        self._steps.append((self._chosen, -learning_rate * shares.double() * self._slopes))

    def movement(self, client: int) -> Adapter:
        """All steps of a client so far as seeds and coefficients."""
        total: dict[int, float] = {}
        moves = torch.stack([moved[client] for _, moved in self._steps]).tolist()
        for (chosen, _), moved in zip(self._steps, moves, strict=True):
            if client in chosen:
                total[chosen[client]] = total.get(chosen[client], 0.0) + moved
        return movement(total)
