"""What a graph allows: spectrum of its Laplacian, and the largest server steps that are safe."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedmira.graphs.graph import Graph

__all__ = ["GraphBounds", "graph_bounds"]

ZERO = 1e-10
"""An eigenvalue below this share of the Gershgorin bound is a zero of the Laplacian."""


@dataclass(frozen=True, slots=True)
class GraphBounds:
    """Bounds of one graph.

    Attributes:
        max_degree: largest sum of a client's weights.
        largest_eigenvalue: lambda_max of the Laplacian.
        connectivity: lambda_2, the second smallest; disagreement shrinks by at least 1 - gamma * lambda_2 a full round. 0 when the
            graph falls into parts.
        gershgorin: 2 * max_degree, an upper bound of lambda_max.
        parts: connected parts, clients without an edge counted.
        largest_convex_step: gamma up to which every mixed adapter lies between its neighbours, 1 / max_degree; None without edges.
        largest_stable_step: gamma below which disagreement shrinks, 2 / lambda_max; None without edges.
    """

    max_degree: float
    largest_eigenvalue: float
    connectivity: float
    gershgorin: float
    parts: int
    largest_convex_step: float | None
    largest_stable_step: float | None


def graph_bounds(graph: Graph) -> GraphBounds:
    """Compute the bounds; cubic in the number of clients."""
    count = len(graph.clients)
    if count == 0 or not bool(graph.weights.any()):
        return GraphBounds(0.0, 0.0, 0.0, 0.0, count, None, None)
    values = torch.linalg.eigvalsh(graph.laplacian)
    max_degree, largest = float(graph.degrees.max()), float(values[-1])
    parts = int((values < ZERO * 2 * max_degree).sum())
    return GraphBounds(
        max_degree=max_degree,
        largest_eigenvalue=largest,
        connectivity=float(values[1]) if parts == 1 else 0.0,
        gershgorin=2 * max_degree,
        parts=parts,
        largest_convex_step=1 / max_degree,
        largest_stable_step=2 / largest,
    )
