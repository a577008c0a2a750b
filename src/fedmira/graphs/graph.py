"""The task graph: symmetric non-negative weights between clients, kept as a list of edges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.sparse import csr_array
from torch import Tensor

from fedmira.errors import RunError
from fedmira.graphs.edges import (
    NO_EDGES,
    degrees_of,
    joined,
    list_of_matrix,
    matrix_of_list,
)

__all__ = ["Graph"]


@dataclass(frozen=True, slots=True)
class Graph:
    """Weights a_kl between clients; `from_matrix` and `from_edges` build one.

    Attributes:
        kind: how it was made, for graph.json.
        clients: their ids, in the order of the rows.
        edge_list: float64 [E, 3]: row, column and weight of every pair that is related, once, with
            row < column, in order.

    Raises:
        RunError: the edge list breaks one of these rules.
    """

    kind: str
    clients: tuple[str, ...]
    edge_list: Tensor

    def __post_init__(self) -> None:
        edges, count = self.edge_list, len(self.clients)
        if edges.ndim != 2 or edges.shape[1] != 3 or edges.dtype != torch.float64:
            raise RunError(
                f"graph {self.kind!r}: its edge list is {edges.dtype} "
                f"{tuple(edges.shape)}; must be float64 [edges, 3]"
            )
        if not bool(torch.isfinite(edges).all()) or not bool((edges[:, 2] > 0).all()):
            raise RunError(
                f"graph {self.kind!r}: a weight of its edge list is not above 0 or not "
                "finite; leave such edges out"
            )
        rows, columns = self.pairs.unbind(dim=1)
        in_range = (
            bool((rows >= 0).all())
            and bool((rows < columns).all())
            and bool((columns < count).all())
        )
        if not in_range or not bool((torch.diff(rows * count + columns) > 0).all()):
            raise RunError(
                f"graph {self.kind!r}: its edge list must hold each pair of its {count} "
                "clients once, as (row, column) with "
                "row < column, in order (build it with Graph.from_matrix or Graph.from_edges)"
            )

    @classmethod
    def from_matrix(cls, kind: str, clients: Sequence[str], weights: Tensor) -> Graph:
        """The graph of a dense matrix of weights, float64 [K, K].

        Args:
            kind: how the graph was made, in a word.
            clients: ids, in the order of the rows.
            weights: a_kl in row k and column l.

        Raises:
            RunError: it is not symmetric and non-negative with a zero diagonal.
        """
        count = len(clients)
        if weights.shape != (count, count):
            raise RunError(
                f"graph {kind!r}: weights have shape {tuple(weights.shape)}; {count} "
                f"clients need {count} x {count}"
            )
        if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
            raise RunError(
                f"graph {kind!r}: a weight is negative or not finite; weights must be 0 or more"
            )
        if bool(weights.diagonal().any()) or not torch.equal(weights, weights.T):
            raise RunError(f"graph {kind!r}: weights must be symmetric with a zero diagonal")
        return cls(kind, tuple(clients), list_of_matrix(weights))

    @classmethod
    def from_edges(
        cls, kind: str, clients: Sequence[str], edges: Iterable[tuple[str, str, float]]
    ) -> Graph:
        """The graph of (client, client, weight), each pair once in either direction.

        Weights of 0 are left out.

        >>> from fedmira.graphs import Graph
        >>> graph = Graph.from_edges("pair", ("a", "b", "c"), [("a", "b", 0.5)])
        >>> graph.degrees.tolist()
        [0.5, 0.5, 0.0]

        Args:
            kind: how the graph was made, in a word.
            clients: ids, in the order of the rows.
            edges: pairs of client ids with their weights.

        Raises:
            RunError: an edge names an unknown client or joins one to itself, or a weight is
                negative or not finite.
        """
        row = {client: k for k, client in enumerate(clients)}
        listed = list(edges)
        unknown = [client for edge in listed for client in edge[:2] if client not in row]
        if unknown:
            raise RunError(
                f"graph {kind!r}: an edge names {unknown[0]!r}, which is not one of its "
                f"{len(row)} clients"
            )
        loops = [source for source, target, _ in listed if source == target]
        if loops:
            raise RunError(
                f"graph {kind!r}: client {loops[0]!r} is joined to itself; leave the edge out"
            )
        weights = torch.tensor([weight for *_, weight in listed], dtype=torch.float64)
        if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
            raise RunError(
                f"graph {kind!r}: a weight is negative or not finite; weights must be 0 or more"
            )
        ends = torch.tensor(
            [[row[source], row[target]] for source, target, _ in listed], dtype=torch.int64
        ).reshape(-1, 2)
        return cls(kind, tuple(clients), joined(ends[:, 0], ends[:, 1], weights, len(row)))

    @property
    def pairs(self) -> Tensor:
        """Row and column of every edge, row < column, int64 [E, 2]."""
        return self.edge_list[:, :2].to(torch.int64)

    @property
    def edge_weights(self) -> Tensor:
        """Weight of every edge, above 0, float64 [E]."""
        return self.edge_list[:, 2]

    @property
    def degrees(self) -> Tensor:
        """delta_k = sum_l a_kl, float64 [K]."""
        return degrees_of(self.edge_list, len(self.clients))

    @property
    def laplacian(self) -> Any:
        """L = D - M as a sparse matrix: scipy's csr_array, float64 [K, K]."""
        count = len(self.clients)
        rows, columns = self.pairs.unbind(dim=1)
        everyone = torch.arange(count)
        entries = torch.cat([-self.edge_weights, -self.edge_weights, self.degrees]).numpy()
        places = (
            torch.cat([rows, columns, everyone]).numpy(),
            torch.cat([columns, rows, everyone]).numpy(),
        )
        return csr_array((entries, places), shape=(count, count))

    def matrix(self) -> Tensor:
        """All weights a_kl, symmetric with a zero diagonal, float64 [K, K]: for few clients."""
        return matrix_of_list(self.edge_list, len(self.clients))

    def edges(self) -> list[tuple[str, str, float]]:
        """Every pair with a weight above 0, once, as (source, target, weight)."""
        pairs, weights = self.pairs.tolist(), self.edge_weights.tolist()
        return [
            (self.clients[i], self.clients[j], weight)
            for (i, j), weight in zip(pairs, weights, strict=True)
        ]

    def position(self, clients: Sequence[str]) -> list[int]:
        """Row numbers of the given clients."""
        row = {client: i for i, client in enumerate(self.clients)}
        return [row[client] for client in clients]

    def moved(self, places: Tensor) -> Graph:
        """The same clients with the weights of others.

        Row k of the old weights becomes row `places[k]`, a permutation, int64 [K].
        """
        ends = places[self.pairs]
        return replace(
            self, edge_list=joined(ends[:, 0], ends[:, 1], self.edge_weights, len(self.clients))
        )

    def among(self, members: Tensor) -> Graph:
        """The same clients with only the edges between two members, bool [K]."""
        return replace(self, edge_list=self.edge_list[members[self.pairs].all(dim=1)])

    def without_edges(self) -> Graph:
        """The same clients with nobody related."""
        return replace(self, edge_list=NO_EDGES)
