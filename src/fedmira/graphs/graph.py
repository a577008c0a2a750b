"""The task graph: symmetric non-negative weights between clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmira.errors import ConfigError

__all__ = ["Graph"]


@dataclass(frozen=True, slots=True)
class Graph:
    """Weights a_kl between clients.

    Attributes:
        kind: how it was made, for graph.json.
        clients: their ids, in the order of the rows.
        weights: float64 [K, K], symmetric, non-negative, zero on the diagonal.

    Raises:
        ConfigError: the weights break one of these rules.
    """

    kind: str
    clients: tuple[str, ...]
    weights: Tensor

    def __post_init__(self) -> None:
        weights = self.weights
        if weights.shape != (len(self.clients), len(self.clients)):
            count = len(self.clients)
            raise ConfigError(f"graph {self.kind!r}: weights have shape {tuple(weights.shape)}; {count} clients need {count} x {count}")
        if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
            raise ConfigError(f"graph {self.kind!r}: a weight is negative or not finite; weights must be 0 or more")
        if bool(weights.diagonal().any()) or not torch.equal(weights, weights.T):
            raise ConfigError(f"graph {self.kind!r}: weights must be symmetric with a zero diagonal")

    @property
    def degrees(self) -> Tensor:
        """delta_k = sum_l a_kl, float64 [K]."""
        return self.weights.sum(dim=1)

    @property
    def laplacian(self) -> Tensor:
        """L = D - M, float64 [K, K]."""
        return torch.diag(self.degrees) - self.weights

    def edges(self) -> list[tuple[str, str, float]]:
        """Every pair with a weight above 0, once, as (source, target, weight)."""
        rows, columns = torch.nonzero(torch.triu(self.weights, diagonal=1), as_tuple=True)
        return [(self.clients[i], self.clients[j], float(self.weights[i, j])) for i, j in zip(rows.tolist(), columns.tolist(), strict=True)]

    def position(self, clients: Sequence[str]) -> list[int]:
        """Row numbers of the given clients."""
        row = {client: i for i, client in enumerate(self.clients)}
        return [row[client] for client in clients]
