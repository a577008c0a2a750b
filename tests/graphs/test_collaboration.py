"""pFedGraph's weights: the projection against a general solver, and their bounds.

What the weights must be whatever the clients.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from fedmira.config import GraphSettings
from fedmira.errors import ConfigError
from fedmira.graphs import (
    CollaborationGraph,
    ExactProducts,
    SketchedProducts,
    collaboration_weights,
    graph_source,
    project_on_simplex,
)
from fedmira.graphs.edges import matrix_of_list


def updates(count: int, seed: int, size: int = 12) -> Tensor:
    return torch.randn(
        count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def cosines_of(vectors: Tensor) -> Tensor:
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    return unit @ unit.T


def everybody(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bool)


def weights_of(
    source: CollaborationGraph, vectors: Tensor, trained: Tensor | None = None
) -> Tensor:
    memory = source.update(
        source.initial(()),
        ExactProducts(vectors @ vectors.T),
        everybody(len(vectors)) if trained is None else trained,
    ).memory
    return matrix_of_list(memory, len(vectors))


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 7), seed=st.integers(0, 2**20), spread=st.floats(0.01, 5))
def test_projection_is_the_nearest_point_of_the_simplex(
    count: int, seed: int, spread: float
) -> None:
    """The way back to the projected point makes no acute angle with the way to any corner.

    That is what nearest means.
    """
    rows = spread * updates(3, seed, count)
    found = project_on_simplex(rows)
    assert bool((found >= 0).all())
    torch.testing.assert_close(
        found.sum(dim=1), torch.ones(3, dtype=torch.float64), rtol=1e-9, atol=0
    )
    back = rows - found
    to_corners = back - (back * found).sum(dim=1, keepdim=True)  # <rows - x, corner - x>
    assert float(to_corners.max()) < 1e-9 * (1 + spread)


@pytest.mark.parametrize("alpha", [0.1, 0.8, 3.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weights_solve_the_quadratic_programme_of_the_paper(alpha: float, seed: int) -> None:
    cosines, shares = (
        cosines_of(updates(6, seed)),
        torch.tensor([1, 2, 4, 8, 1, 4], dtype=torch.float64) / 20,
    )
    found = collaboration_weights(cosines, shares, alpha)
    for k in range(6):
        distances = np.where(cosines[k].numpy() > 0.9, -1.0, -cosines[k].numpy())
        solved = minimize(
            lambda x, d: alpha * x @ x + d @ x - 2 * alpha * shares.numpy() @ x,
            np.full(6, 1 / 6),
            args=(distances,),
            method="SLSQP",
            bounds=[(0, 1)] * 6,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert solved.success
        np.testing.assert_allclose(found[k].numpy(), solved.x, atol=1e-5)


def test_limits_of_alpha_are_the_data_shares_and_the_client_itself() -> None:
    cosines, shares = (
        cosines_of(updates(5, 3)),
        torch.tensor([0.1, 0.2, 0.3, 0.1, 0.3], dtype=torch.float64),
    )
    torch.testing.assert_close(
        collaboration_weights(cosines, shares, 1e9), shares.expand(5, -1), rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close(
        collaboration_weights(cosines, shares, 1e-3), torch.eye(5, dtype=torch.float64)
    )


def test_cosines_above_nine_tenths_count_as_equal() -> None:
    near = torch.tensor([[1, 0.95, 0.2], [0.95, 1, 0.2], [0.2, 0.2, 1]], dtype=torch.float64)
    weights = collaboration_weights(near, torch.full((3,), 1 / 3, dtype=torch.float64), 0.5)
    assert float(weights[0, 0]) == float(weights[0, 1]) > float(weights[0, 2])


def test_the_graph_is_the_mean_of_both_directions() -> None:
    vectors, rows = updates(6, 4), (16.0, 32.0, 64.0, 128.0, 16.0, 32.0)
    chosen = collaboration_weights(
        cosines_of(vectors), torch.tensor(rows, dtype=torch.float64) / 288, 0.8
    )
    assert not torch.equal(chosen, chosen.T)
    expected = ((chosen + chosen.T) / 2).fill_diagonal_(0)
    torch.testing.assert_close(
        weights_of(CollaborationGraph(rows=rows), vectors), expected, rtol=1e-9, atol=1e-12
    )


def test_with_a_small_alpha_a_client_unlike_all_others_has_no_edges() -> None:
    """Likeness 1 to itself and 0 to the others.

    The gap 1 / (2 alpha) is above 1 below alpha = 0.5. Twins share evenly.
    """
    vectors = torch.eye(5, dtype=torch.float64)[[0, 0, 1, 1, 2]]
    weights = weights_of(CollaborationGraph(alpha=0.4), vectors)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    expected[0, 1] = expected[1, 0] = expected[2, 3] = expected[3, 2] = 0.5
    torch.testing.assert_close(weights, expected)
    assert bool(
        weights_of(CollaborationGraph(alpha=0.8), vectors)[4].any()
    )  # the paper's value shares with strangers too


@settings(deadline=None, max_examples=30)
@given(count=st.integers(2, 8), alpha=st.floats(0.05, 5), seed=st.integers(0, 2**20))
def test_weights_are_a_graph_that_permutes_with_the_clients(
    count: int, alpha: float, seed: int
) -> None:
    vectors = updates(count, seed, 4)
    rows = tuple(float(1 + (seed + 7 * k) % 50) for k in range(count))
    weights = weights_of(CollaborationGraph(alpha=alpha, rows=rows), vectors)
    assert torch.equal(weights, weights.T)
    assert bool((weights >= 0).all())
    assert not bool(weights.diagonal().any())
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    source = CollaborationGraph(alpha=alpha, rows=tuple(rows[k] for k in order.tolist()))
    torch.testing.assert_close(
        weights_of(source, vectors[order]), weights[order][:, order], rtol=1e-7, atol=1e-9
    )


def test_clients_without_an_update_have_no_edges_and_no_share() -> None:
    vectors = updates(5, 6)
    vectors[2] = 0
    trained = torch.tensor([True, True, True, True, False])
    weights = weights_of(CollaborationGraph(rows=(8.0, 16.0, 1e6, 32.0, 1e6)), vectors, trained)
    assert not bool(weights[[2, 4]].any())
    present = [0, 1, 3]
    expected = weights_of(CollaborationGraph(rows=(8.0, 16.0, 32.0)), vectors[present])
    torch.testing.assert_close(weights[present][:, present], expected)


def test_a_single_trained_client_has_nobody_to_collaborate_with() -> None:
    assert not bool(
        weights_of(CollaborationGraph(), updates(3, 0), torch.tensor([True, False, False])).any()
    )


def test_sketches_without_loss_give_the_exact_graph() -> None:
    """Sketches whose inner products are those of the updates."""
    vectors = updates(6, 7)
    source = CollaborationGraph(sketch=12)
    products = SketchedProducts(vectors.float())
    found = source.update(source.initial(()), products, everybody(6)).memory
    torch.testing.assert_close(
        matrix_of_list(found, 6), weights_of(CollaborationGraph(), vectors), rtol=1e-4, atol=1e-5
    )


def test_settings_reach_the_graph_and_too_many_clients_are_refused() -> None:
    clients = ("a", "b", "c")
    chosen = GraphSettings(
        kind="pfedgraph", alpha=0.3, memory=0, measure="principal-angles", shuffled=True
    )
    source = graph_source(chosen, clients, {}, seed=5, rows={"c": 3, "a": 1, "b": 2})
    assert source == CollaborationGraph(
        memory=0, shuffle_seed=5, space="subspace", alpha=0.3, rows=(1.0, 2.0, 3.0)
    )
    many = [f"client-{k}" for k in range(2002)]
    with pytest.raises(
        ConfigError, match=r"'pfedgraph': its rule relates 2,003,001 pairs .*'similarity'"
    ):
        graph_source(GraphSettings(kind="pfedgraph"), many, {}, seed=0)
