"""What a graph allows: spectrum of its Laplacian, and the largest server steps that are safe."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedmira.graphs.graph import Graph

__all__ = ["GraphBounds", "graph_bounds"]

ZERO = 1e-10
"""An eigenvalue below this share of the Gershgorin bound is a zero of the Laplacian."""
WHOLE_SPECTRUM = 512
"""Most clients for which all eigenvalues are computed."""
ENOUGH = 1e-6
"""Relative accuracy of the largest eigenvalue of a larger graph."""


@dataclass(frozen=True, slots=True)
class GraphBounds:
    """Bounds of one graph.

    Attributes:
        max_degree: largest sum of a client's weights.
        largest_eigenvalue: lambda_max of the Laplacian; above 512 clients to six digits.
        connectivity: lambda_2, the second smallest; disagreement shrinks by at least 1 - gamma *
            lambda_2 a full round. 0 when the graph falls into parts; None for a connected graph of
            more than 512 clients, where it would cost too much.
        gershgorin: 2 * max_degree, an upper bound of lambda_max.
        parts: connected parts, clients without an edge counted.
        largest_convex_step: gamma up to which every mixed adapter lies between its neighbours, 1 /
            max_degree; None without edges.
        largest_stable_step: gamma below which disagreement shrinks, 2 / lambda_max; None without
            edges.
    """

    max_degree: float
    largest_eigenvalue: float
    connectivity: float | None
    gershgorin: float
    parts: int
    largest_convex_step: float | None
    largest_stable_step: float | None


def graph_bounds(graph: Graph) -> GraphBounds:
    """Compute the bounds of a graph.

    The time is cubic in the number of clients up to 512, and about linear in the number of edges
    above.
    """
    count = len(graph.clients)
    if len(graph.edge_list) == 0:
        return GraphBounds(0.0, 0.0, 0.0, 0.0, count, None, None)
    max_degree = float(graph.degrees.max())
    largest, connectivity, parts = (
        _all_eigenvalues if count <= WHOLE_SPECTRUM else _largest_eigenvalue
    )(graph, max_degree)
    return GraphBounds(
        max_degree=max_degree,
        largest_eigenvalue=largest,
        connectivity=connectivity,
        gershgorin=2 * max_degree,
        parts=parts,
        largest_convex_step=1 / max_degree,
        largest_stable_step=2 / largest,
    )


def _all_eigenvalues(graph: Graph, max_degree: float) -> tuple[float, float | None, int]:
    """lambda_max, lambda_2 and the number of parts, from the dense Laplacian."""
    values = torch.linalg.eigvalsh(torch.diag(graph.degrees) - graph.matrix())
    parts = int((values < ZERO * 2 * max_degree).sum())
    return float(values[-1]), float(values[1]) if parts == 1 else 0.0, parts


def _largest_eigenvalue(graph: Graph, max_degree: float) -> tuple[float, float | None, int]:
    """The same from the sparse Laplacian, by Lanczos and a search of the graph."""
    # Only `fedmira check` of a large fixed graph comes here; a run should not wait for these
    # imports.
    from scipy.sparse.csgraph import connected_components
    from scipy.sparse.linalg import eigsh

    laplacian = graph.laplacian
    start = torch.randn(
        len(graph.clients), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    largest = float(
        eigsh(laplacian, k=1, which="LA", v0=start.numpy(), tol=ENOUGH, return_eigenvectors=False)[
            0
        ]
    )
    parts = int(connected_components(laplacian, directed=False, return_labels=False))
    return largest, None if parts == 1 else 0.0, parts
