"""Batches and noise of DP-SGD (Abadi et al. 2016): what a client draws for itself.

A step takes each row with the same probability, on its own (Poisson sampling), and divides by the
number of rows that are expected and not by the number that came.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmira.config import LocalSettings
from fedmira.model.base.rows import Row
from fedmira.model.base.transfer import on_device
from fedmira.model.lora.branches import Stack
from fedmira.model.training.batches import batch_indices, count_steps

__all__ = ["PrivateSteps", "RowPrivacy", "batches_of"]


@dataclass(frozen=True, slots=True)
class RowPrivacy:
    """How a client hides each of its rows.

    Attributes:
        clip: the longest that the gradient of a row's mean loss may be.
        noise: standard deviation in clips, of the sum of a step's gradients.
        rate: probability with which a row takes part in a step.
        batch: rows of a step on average, by which the sum is divided.
        secret: whether seeds come from the operating system; else that of the request is taken.
    """

    clip: float
    noise: float
    rate: float
    batch: int
    secret: bool


class PrivateSteps:
    """The draws of a cohort's clients in one round, and the steps that are made with them.

    Args:
        stacked: the clients' adapters and gradients.
        clients: how each hides its rows.
        seeds: of each client's draws.
    """

    def __init__(self, stacked: Stack, clients: Sequence[RowPrivacy], seeds: Sequence[int]) -> None:
        self._stacked, self._clients = stacked, clients
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    @classmethod
    def of(
        cls, stacked: Stack, clients: Sequence[RowPrivacy | None], seeds: Sequence[int]
    ) -> PrivateSteps | None:
        """The steps of clients that hide their rows; None where nobody does.

        Args:
            stacked: the clients' adapters and gradients.
            clients: how each hides its rows: all of them do, or none.
            seeds: of the requests, which are taken where draws may be known.
        """
        hiding = [each for each in clients if each is not None]
        if not hiding:
            return None
        assert len(hiding) == len(clients), "all clients of a cohort hide their rows, or none does"
        own = [
            secrets.randbits(63) if each.secret else seed
            for each, seed in zip(hiding, seeds, strict=True)
        ]
        return cls(stacked, hiding, own)

    def batches(self, rows: Sequence[int], settings: LocalSettings) -> list[Iterator[list[int]]]:
        """The rows of each client's steps, perhaps none in a step.

        Args:
            rows: training rows of each client.
            settings: the [local] section, which says how many steps there are.
        """

        def drawn(client: int, count: int) -> Iterator[list[int]]:
            for _ in range(count_steps(count, settings)):
                chance = torch.rand(count, generator=self._generators[client])
                chosen = torch.nonzero(chance < self._clients[client].rate)
                yield chosen.flatten().tolist()

        return [drawn(client, count) for client, count in enumerate(rows)]

    def sizes(self, clients: Sequence[int]) -> dict[int, int]:
        """Rows of a step on average; how many there were tells who took part.

        Args:
            clients: those that make a step.
        """
        return {client: self._clients[client].batch for client in clients}

    def clipped(
        self,
        batches: Mapping[int, Sequence[Row]],
        fill: Callable[[Mapping[int, list[Row]]], Tensor],
    ) -> Tensor:
        """Fill the stacked gradients with sums of the rows' clipped ones; sums of losses [K].

        One row of every client at a time, so that gradients of single rows come out of the same
        passes as those of whole batches.

        Args:
            batches: client -> its rows of this step.
            fill: writes gradients of the clients' mean losses on a few rows, and gives the sums of
                losses.
        """
        total = torch.zeros_like(self._stacked.gradients)
        sums = torch.zeros(len(self._clients), dtype=torch.float64, device=total.device)
        limits = on_device([each.clip for each in self._clients], total.device)
        for place in range(max(map(len, batches.values()))):
            sums += fill(
                {client: [rows[place]] for client, rows in batches.items() if place < len(rows)}
            ).nan_to_num(0.0, 0.0, 0.0)
            _clip(self._stacked.gradients, limits)
            total += self._stacked.gradients
        self._stacked.gradients.copy_(total)
        return sums

    def add_noise(self, clients: Sequence[int]) -> None:
        """Noise on each client's sum, in its own entries, and the mean over the expected rows.

        Args:
            clients: those that make a step.
        """
        for client in clients:
            own, generator = self._clients[client], self._generators[client]
            for view in self._stacked.views(self._stacked.gradients, client).values():
                drawn = torch.randn(view.shape, generator=generator, dtype=torch.float32)
                noise = (drawn * (own.noise * own.clip)).to(view.device, view.dtype)
                view.add_(noise).div_(own.batch)


def batches_of(
    private: PrivateSteps | None,
    rows: Sequence[int],
    settings: LocalSettings,
    seeds: Sequence[int],
) -> list[Iterator[list[int]]]:
    """The rows of each client's local steps, in private ones perhaps none.

    Args:
        private: the steps of clients that hide their rows, or None.
        rows: training rows of each client.
        settings: the [local] section.
        seeds: of each client's draws where rows are not hidden.
    """
    if private is not None:
        return private.batches(rows, settings)
    return [batch_indices(count, settings, seed) for count, seed in zip(rows, seeds, strict=True)]


def _clip(gradients: Tensor, limits: Tensor) -> None:
    """Scale each gradient [K, P] in place to its limit [K]; zero where it is not finite."""
    norms = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64)
    # Rounding to float32 must not leave a norm above its limit.
    shares = torch.where(norms > limits, limits / norms * (1 - 1e-6), 1.0)
    gradients.mul_(shares[:, None].to(gradients.dtype))
    # A norm that is not finite has no direction; noise covers that the row took no part.
    gradients.masked_fill_(~torch.isfinite(norms)[:, None], 0)
