"""Inner products between the updates of all clients, in two forms.

All of them, or estimates from sketches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fedmira.graphs.similarity import Likeness, cosines_of, likeness, sketched_likeness

__all__ = ["ExactProducts", "InnerProducts", "SketchedProducts"]

CHUNK = 128
"""Entries of the sketches that are multiplied with a Laplacian at a time."""


class InnerProducts(Protocol):
    """What the graph side asks of the inner products <x_k, x_l>."""

    def likeness(
        self, trained: Tensor, nearest: int, arrange: Callable[[Tensor], Tensor] | None = None
    ) -> Likeness:
        """The similarity graph of one round among the clients that have trained, bool [K].

        Args:
            trained: which clients have trained, bool [K].
            nearest: how many neighbours each client keeps.
            arrange: what is made of all weights, float64 [K, K], before neighbours are chosen, for
                few clients; None leaves them.
        """
        ...

    def cosines(self, trained: Tensor) -> Tensor:
        """<x_k, x_l> / (|x_k| |x_l|) between the clients that have trained, bool [K].

        The result is float64 [K, K], for few clients.

        Rows and columns of clients that have not, or whose x is zero, are 0 throughout; the others
        have 1 on the diagonal.
        """
        ...

    def trace(self, laplacian: Any) -> float:
        """The sum over k and l of L_kl <x_k, x_l> for a sparse float64 [K, K] matrix L.

        With the Laplacian of a graph it is the graph's disagreement.

        1/2 sum_kl a_kl |x_k - x_l|^2 is tr(L G), with G the Gram matrix.
        """
        ...


@dataclass(frozen=True, slots=True)
class ExactProducts:
    """The Gram matrix.

    Attributes:
        gram: float64 [K, K]; rows and columns of clients that never trained are not read.
        error: of a cosine, root mean square, where the products themselves are estimates.
    """

    gram: Tensor
    error: float = 0.0

    def likeness(
        self, trained: Tensor, nearest: int, arrange: Callable[[Tensor], Tensor] | None = None
    ) -> Likeness:
        """The similarity graph, from exact cosines."""
        return likeness(self.gram, trained, nearest, self.error, arrange)

    def cosines(self, trained: Tensor) -> Tensor:
        """Exact, to float64 rounding."""
        cosine, taking_part = cosines_of(self.gram, trained)
        cosines = torch.zeros_like(self.gram)
        cosines[taking_part[:, None], taking_part[None, :]] = cosine
        return cosines

    def trace(self, laplacian: Any) -> float:
        """Exact, to float64 rounding."""
        entries = laplacian.tocoo()
        rows, columns = (
            torch.from_numpy(place).to(torch.int64) for place in (entries.row, entries.col)
        )
        return float(torch.from_numpy(entries.data) @ self.gram[rows, columns])


@dataclass(frozen=True, slots=True)
class SketchedProducts:
    """Estimates <S x_k, S x_l>, unbiased, with the error that the sketch states.

    Attributes:
        sketches: float32 [K, m]; zeros for clients that never trained.
    """

    sketches: Tensor

    def likeness(
        self, trained: Tensor, nearest: int, arrange: Callable[[Tensor], Tensor] | None = None
    ) -> Likeness:
        """From cosines between sketches; all at once where weights are arranged."""
        if arrange is None:
            return sketched_likeness(self.sketches, trained, nearest)
        return self._products().likeness(trained, nearest, arrange)

    def cosines(self, trained: Tensor) -> Tensor:
        """Estimates from the sketches."""
        return self._products().cosines(trained)

    def _products(self) -> ExactProducts:
        """The estimates of all pairs, and what a cosine among them is off by."""
        sketches = self.sketches.to(torch.float64)
        return ExactProducts(sketches @ sketches.T, 1 / math.sqrt(self.sketches.shape[1]))

    def trace(self, laplacian: Any) -> float:
        """An unbiased estimate: the sum over the entries of <column, L column>.

        It costs edges times entries.
        """
        total = 0.0
        for first in range(0, self.sketches.shape[1], CHUNK):
            part = self.sketches[:, first : first + CHUNK].to(torch.float64).numpy()
            total += float((part * (laplacian @ part)).sum())
        return total
