"""What MIRA keeps of all adapters that have trained, so that a round reads few of them.

Inner products, or a sketch of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmira.adapters import (
    Adapter,
    column_spaces,
    cross_gram,
    dot_products,
    factor_sketches,
    module_grams,
    product_sketches,
)
from fedmira.graphs import ExactProducts, InnerProducts, SketchedProducts

__all__ = ["KeptProducts", "Take", "Taken"]

AT_A_TIME = 32
"""Adapters in memory at a time while they are sketched or compared with changed ones."""

NO_DIFFERENCE = 1e-12
"""A squared difference below this share of the largest squared norm is rounding."""

Taken = tuple[list[Adapter], list[float]]
"""Adapters and the scale alpha / rank of each."""
Take = Callable[[Sequence[int]], Taken]
"""The adapters of the clients at these positions."""


def _spaces(taken: Taken) -> Taken:
    """Where the updates point to, whatever their scale."""
    return [column_spaces(adapter) for adapter in taken[0]], [1.0] * len(taken[0])


_VIEWS: Mapping[str, Callable[[Taken], Taken]] = {
    "product": lambda taken: taken,
    "factor": lambda taken: taken,
    "subspace": _spaces,
}
"""Space -> what of the adapters is compared."""
_PRODUCTS: Mapping[str, Callable[[Taken, Taken], Tensor]] = {
    "product": lambda rows, columns: cross_gram(*rows, *columns),
    "factor": lambda rows, columns: dot_products(rows[0], columns[0]),
    "subspace": lambda rows, columns: cross_gram(*rows, *columns),
}
"""Space -> inner products, float64 [rows, columns]."""
_SKETCHES: Mapping[str, Callable[[Taken, int], Tensor]] = {
    "product": lambda taken, entries: product_sketches(*taken, entries),
    "factor": lambda taken, entries: factor_sketches(taken[0], entries),
    "subspace": lambda taken, entries: product_sketches(*taken, entries),
}
"""Space -> sketches, float32 [adapters, entries]."""

_PARTS: Mapping[str, Callable[[Taken], Iterator[Tensor]]] = {
    "product": lambda taken: module_grams(*taken, *taken),
    "factor": lambda taken: iter([dot_products(taken[0], taken[0])]),
}
"""Space -> inner products of a few adapters with each other, float64 [n, n].

They are summed over the parts of the adapters, one part after the other.
"""


@dataclass(frozen=True, slots=True)
class KeptProducts:
    """Inner products of all clients' adapters, as tensors of the state's numbers.

    Exact: "product_gram", "factor_gram" and "subspace_gram", float64 [K, K]; refreshing the rows of
    some clients reads all adapters that have trained. Sketched: "product_sketch" and so on, float32
    [K, m]; refreshing reads the adapters of those clients only.

    Attributes:
        spaces: some of "product", "factor" and "subspace".
        entries: m of the sketches; 0 for exact inner products.
    """

    spaces: tuple[str, ...]
    entries: int

    def _name(self, space: str) -> str:
        return f"{space}_{'sketch' if self.entries else 'gram'}"

    def initial(self, count: int) -> dict[str, Tensor]:
        """Zeros, before anybody has trained."""
        empty = (
            torch.zeros(count, self.entries)
            if self.entries
            else torch.zeros(count, count, dtype=torch.float64)
        )
        return {self._name(space): empty.clone() for space in self.spaces}

    def copied(self, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the kept tensors, to be refreshed in place."""
        return {self._name(space): numbers[self._name(space)].clone() for space in self.spaces}

    def of(self, numbers: Mapping[str, Tensor], space: str) -> InnerProducts:
        """The inner products in one of the spaces.

        Args:
            numbers: those of the server's state.
            space: the name of the space.
        """
        kept = numbers[self._name(space)]
        return SketchedProducts(kept) if self.entries else ExactProducts(kept)

    def refresh(
        self, numbers: Mapping[str, Tensor], changed: Sequence[int], trained: Tensor, take: Take
    ) -> None:
        """Compute what belongs to the changed clients anew, in place.

        Args:
            numbers: from `copied`.
            changed: positions of clients whose adapter is a new one; they have trained.
            trained: clients that have trained, bool [K].
            take: reads adapters as they are now.
        """
        if not changed:
            return
        if not self.entries:
            self._refresh_exact(numbers, changed, torch.nonzero(trained).flatten().tolist(), take)
            return
        for first in range(0, len(changed), AT_A_TIME):
            part = changed[first : first + AT_A_TIME]
            taken = take(part)
            for space in self.spaces:
                numbers[self._name(space)][part] = _SKETCHES[space](
                    _VIEWS[space](taken), self.entries
                )

    def _refresh_exact(
        self,
        numbers: Mapping[str, Tensor],
        changed: Sequence[int],
        others: Sequence[int],
        take: Take,
    ) -> None:
        """Rows and columns of the changed clients.

        Their adapters stay in memory while the others come a few at a time.
        """
        taken, row = take(changed), torch.tensor(changed, dtype=torch.int64)[:, None]
        rows = {space: _VIEWS[space](taken) for space in self.spaces}
        for first in range(0, len(others), AT_A_TIME):
            part = others[first : first + AT_A_TIME]
            taken, column = take(part), torch.tensor(part, dtype=torch.int64)[None, :]
            for space in self.spaces:
                block, products = (
                    _PRODUCTS[space](rows[space], _VIEWS[space](taken)),
                    numbers[self._name(space)],
                )
                products[row, column] = block
                products[column.T, row.T] = block.T

    def differ(
        self,
        numbers: Mapping[str, Tensor],
        space: str,
        positions: Sequence[int],
        taken: Taken,
        toward: Tensor,
    ) -> bool:
        """Whether a weighted sum of a few adapters is more than the rounding of zero.

        Exactly, from their adapters where sketches are kept.

        Args:
            numbers: as kept.
            space: of the sum.
            positions: which clients, n of them.
            taken: their adapters.
            toward: weights, float64 [n].
        """
        if self.entries:
            parts = _PARTS[space](taken)
        else:
            place = torch.tensor(positions, dtype=torch.int64)
            parts = iter([numbers[self._name(space)][place[:, None], place[None, :]]])
        return any(
            bool(toward @ products @ toward > NO_DIFFERENCE * products.diagonal().max())
            for products in parts
        )
