"""Spectral bounds against graphs whose spectrum is known."""

from __future__ import annotations

import math

import pytest
import torch

from fedmira.graphs import (
    Graph,
    category_graph,
    graph_bounds,
    random_graph,
    uniform_graph,
)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"client-{k}" for k in range(count))


def path_graph(count: int) -> Graph:
    """Client k is joined to client k + 1."""
    clients = names(count)
    return Graph.from_edges(
        "file", clients, zip(clients, clients[1:], [1.0] * (count - 1), strict=False)
    )


def test_uniform_graph_has_eigenvalues_zero_and_k() -> None:
    """The Laplacian of the complete graph is K I - 1 1^T."""
    bounds = graph_bounds(uniform_graph(names(5)))
    assert bounds.largest_eigenvalue == pytest.approx(5)
    assert bounds.connectivity == pytest.approx(5)
    assert bounds.max_degree == 4
    assert bounds.gershgorin == 8
    assert bounds.largest_convex_step == pytest.approx(1 / 4)
    assert bounds.largest_stable_step == pytest.approx(2 / 5)
    assert bounds.parts == 1


def test_path_of_three_has_eigenvalues_zero_one_three() -> None:
    bounds = graph_bounds(path_graph(3))
    assert (bounds.connectivity, bounds.largest_eigenvalue) == (pytest.approx(1), pytest.approx(3))


def test_a_graph_in_parts_has_no_connectivity() -> None:
    clients = names(5)
    bounds = graph_bounds(category_graph(clients, dict(zip(clients, "xxyyz", strict=True))))
    assert bounds.parts == 3
    assert bounds.connectivity == 0
    assert bounds.largest_eigenvalue == pytest.approx(2)


def test_a_graph_without_edges_has_no_largest_step() -> None:
    bounds = graph_bounds(Graph.from_edges("file", names(3), []))
    assert bounds.parts == 3
    assert bounds.largest_convex_step is None
    assert bounds.largest_stable_step is None


@pytest.mark.parametrize("seed", range(5))
def test_gershgorin_bounds_the_largest_eigenvalue_and_the_convex_step_is_stable(seed: int) -> None:
    bounds = graph_bounds(random_graph(names(15), seed))
    assert bounds.max_degree < bounds.largest_eigenvalue <= bounds.gershgorin
    assert bounds.largest_convex_step is not None
    assert bounds.largest_stable_step is not None
    assert bounds.largest_convex_step <= bounds.largest_stable_step + 1e-12


def test_disagreement_shrinks_by_one_minus_gamma_lambda_two_at_least() -> None:
    graph = random_graph(names(8), 1)
    bounds = graph_bounds(graph)
    assert bounds.connectivity is not None
    gamma = 1 / bounds.largest_eigenvalue
    values = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    apart = values - values.mean(dim=0)
    after = apart - gamma * torch.from_numpy(graph.laplacian @ apart.numpy())
    assert float(after.norm()) <= (1 - gamma * bounds.connectivity) * float(apart.norm()) * (
        1 + 1e-12
    )
    assert math.isclose(float(after.mean()), float(apart.mean()), abs_tol=1e-12)


@pytest.mark.parametrize("count", [3, 600])
def test_largest_eigenvalue_and_parts_of_small_and_large_graphs(count: int) -> None:
    """The Laplacian of a path has the eigenvalues 2 - 2 cos(pi k / K).

    A lone client is a part of its own.
    """
    bounds = graph_bounds(path_graph(count))
    expected = 2 - 2 * math.cos(math.pi * (count - 1) / count)
    assert bounds.largest_eigenvalue == pytest.approx(expected, rel=1e-5)
    assert bounds.largest_stable_step == pytest.approx(2 / expected, rel=1e-5)
    assert bounds.parts == 1
    assert bounds.connectivity == (
        None if count > 512 else pytest.approx(2 - 2 * math.cos(math.pi / count))
    )
    apart = graph_bounds(path_graph(count).among(torch.arange(count) < count - 1))
    assert (apart.parts, apart.connectivity) == (2, 0)
