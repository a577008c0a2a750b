"""Sums of squared gradients of a cohort: what a client's batches say of each entry's precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedmira.adapters import Adapter
from fedmira.model.base.transfer import on_device
from fedmira.model.lora.branches import Stack

__all__ = ["SquaredGradients"]


class SquaredGradients:
    """Sum over a client's batches b of |b| / n g_b^2, g_b the gradient of the batch's mean loss.

    Args:
        stacked: the adapters and their gradients.
        rows: training rows n of each client; None where nobody asked for its sum.
    """

    def __init__(self, stacked: Stack, rows: Sequence[int | None]) -> None:
        self._stacked, self._rows = stacked, rows
        self._sums = torch.zeros_like(stacked.values) if any(rows) else None

    def add(self, sizes: Mapping[int, int]) -> None:
        """Count the gradients as they stand; those of clients that have failed are zero.

        Args:
            sizes: client -> how many rows its batch has.
        """
        asked = [client for client in sizes if self._rows[client]]
        if self._sums is None or not asked:
            return
        device = self._sums.device
        shares = [sizes[client] / (self._rows[client] or 1) for client in asked]
        places, weights = on_device(asked, device), on_device(shares, device)
        squares = self._stacked.gradients[places].square() * weights[:, None]
        self._sums.index_add_(0, places, squares)

    def of(self, client: int) -> Adapter | None:
        """A client's sum, named and shaped as its adapter; None where it did not ask.

        Args:
            client: its place in the cohort.
        """
        if self._sums is None or not self._rows[client]:
            return None
        views = self._stacked.views(self._sums, client)
        return {name: view.detach().cpu().clone() for name, view in views.items()}
