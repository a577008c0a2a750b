"""Spectral bounds against graphs whose spectrum is known."""

from __future__ import annotations

import math

import pytest
import torch

from fedmira.graphs import Graph, category_graph, graph_bounds, random_graph, uniform_graph


def names(count: int) -> tuple[str, ...]:
    return tuple(f"client-{k}" for k in range(count))


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
    weights = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=torch.float64)
    bounds = graph_bounds(Graph("file", names(3), weights))
    assert (bounds.connectivity, bounds.largest_eigenvalue) == (pytest.approx(1), pytest.approx(3))


def test_a_graph_in_parts_has_no_connectivity() -> None:
    clients = names(5)
    bounds = graph_bounds(category_graph(clients, dict(zip(clients, "xxyyz", strict=True))))
    assert bounds.parts == 3
    assert bounds.connectivity == 0
    assert bounds.largest_eigenvalue == pytest.approx(2)


def test_a_graph_without_edges_has_no_largest_step() -> None:
    bounds = graph_bounds(Graph("file", names(3), torch.zeros(3, 3, dtype=torch.float64)))
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
    gamma = 1 / bounds.largest_eigenvalue
    values = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    apart = values - values.mean(dim=0)
    after = apart - gamma * graph.laplacian @ apart
    assert float(after.norm()) <= (1 - gamma * bounds.connectivity) * float(apart.norm()) * (1 + 1e-12)
    assert math.isclose(float(after.mean()), float(apart.mean()), abs_tol=1e-12)
