"""What local training asks of a cohort's adapters, whatever their kind.

A matrix with a row per client, and something that applies it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedmira.adapters import Adapter
from fedmira.model.base.rows import Row

__all__ = ["Branch", "Draws", "Passes", "Stack", "TokenLosses"]

Draws = Mapping[int, Sequence[Tensor]]
"""Client -> per row of its batch a uniform number on [0, 1), float64, for every response token."""


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Losses of M response tokens from one forward pass.

    Attributes:
        values: float32 [M], minus log probability in nats, with gradient where asked for.
        clients, rows: int64 [M], the client (position in the cohort) and the row of its batch that
            each token belongs to.
        num_tokens: client -> token positions that were computed, padding included.
    """

    values: Tensor
    clients: Tensor
    rows: Tensor
    num_tokens: Mapping[int, int]


class Stack(Protocol):
    """The adapters of a cohort of K clients as one float32 matrix [K, P].

    Gradients have the same shape.
    """

    values: Tensor
    gradients: Tensor

    def __len__(self) -> int:
        """The number K of clients in the cohort."""
        ...

    def adapter(self, client: int) -> Adapter:
        """A copy of a client's adapter, on the CPU."""
        ...

    def copied(self, matrix: Tensor, client: int) -> Adapter:
        """A copy of a client's row of a [K, P] matrix on the CPU, fetched in one piece."""
        ...

    def views(self, matrix: Tensor, client: int) -> Adapter:
        """A client's row of a [K, P] matrix (values, gradients, moments) as named views."""
        ...


class Branch(Protocol):
    """Applies the adapters of a stack to the frozen model; a context manager around forward passes.

    Attributes:
        dropout: probability of dropping an input of the branch in training.
        generators: one random stream per client for dropout; empty without.
    """

    dropout: float
    generators: Sequence[torch.Generator]

    @property
    def adapters(self) -> Stack:
        """The adapters that the model is run with."""
        ...

    def __enter__(self) -> Branch:
        """From here on the model runs with the adapters."""
        ...

    def __exit__(self, *_: object) -> None:
        """From here on it runs without."""
        ...


class Passes(Protocol):
    """Forward passes with a branch: its losses, a pass of at most `budget` tokens at a time.

    The caller must use (backward) each result before the next; a backward pass adds to the
    gradients of the branch's stack.
    """

    def __call__(
        self, batches: Sequence[tuple[int, Sequence[Row]]], budget: int, draws: Draws | None = None
    ) -> Iterator[TokenLosses]:
        """Response losses of (client, rows) batches, of targets that `draws` draws where given."""
        ...
