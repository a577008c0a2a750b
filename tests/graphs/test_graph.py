"""The task graph as a list of edges: what it refuses, and that it is the matrix it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.errors import RunError
from fedmira.graphs import (
    ExactProducts,
    Graph,
    SketchedProducts,
    random_graph,
)
from fedmira.graphs.edges import (
    blended,
    joined,
    list_of_matrix,
    matrix_of_list,
)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"client-{k}" for k in range(count))


@pytest.mark.parametrize(
    ("weights", "part"),
    [
        ([[0.0, 1.0]], "2 x 2"),
        ([[0.0, -1.0], [-1.0, 0.0]], "negative"),
        ([[0.0, float("nan")], [float("nan"), 0.0]], "not finite"),
        ([[1.0, 0.0], [0.0, 0.0]], "diagonal"),
        ([[0.0, 1.0], [0.5, 0.0]], "symmetric"),
    ],
)
def test_a_matrix_that_is_no_graph_fails_the_run_as_no_setting_made_it(
    weights: list[list[float]], part: str
) -> None:
    with pytest.raises(RunError, match=part):
        Graph.from_matrix("file", ("a", "b"), torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize(
    ("edges", "part"),
    [
        ([[0.0, 1.0, 0.0]], "not above 0"),
        ([[0.0, 1.0, float("inf")]], "not finite"),
        ([[1.0, 0.0, 1.0]], "row < column"),
        ([[1.0, 1.0, 1.0]], "row < column"),
        ([[0.0, 3.0, 1.0]], "row < column"),
        ([[-1.0, 1.0, 1.0]], "row < column"),
        ([[0.0, 1.0, 1.0], [0.0, 1.0, 2.0]], "once"),
        ([[1.0, 2.0, 1.0], [0.0, 1.0, 2.0]], "in order"),
        ([[0.0, 1.0]], r"float64 \[edges, 3\]"),
    ],
)
def test_an_edge_list_that_is_none_fails_the_run_as_no_setting_made_it(
    edges: list[list[float]], part: str
) -> None:
    with pytest.raises(RunError, match=part):
        Graph("file", ("a", "b", "c"), torch.tensor(edges, dtype=torch.float64))


@pytest.mark.parametrize(
    ("edge", "part"),
    [
        (("a", "z", 1.0), "'z'"),
        (("a", "a", 1.0), "joined to itself"),
        (("a", "b", -1.0), "negative"),
        (("a", "b", float("nan")), "finite"),
    ],
)
def test_edges_that_are_none_fail_the_run_as_no_setting_made_them(
    edge: tuple[str, str, float], part: str
) -> None:
    with pytest.raises(RunError, match=part):
        Graph.from_edges("file", ("a", "b"), [edge])


def test_edges_come_back_once_in_order_of_the_clients() -> None:
    graph = Graph.from_edges(
        "file", ("a", "b", "c"), [("c", "b", 0.5), ("b", "a", 2.0), ("a", "c", 0.0)]
    )
    assert graph.edges() == [("a", "b", 2.0), ("b", "c", 0.5)]
    assert graph.degrees.tolist() == [2.0, 2.5, 0.5]
    assert graph.position(["c", "a"]) == [2, 0]
    assert graph.without_edges().edges() == []


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 8), seed=st.integers(0, 2**20))
def test_an_edge_list_stands_for_its_matrix(count: int, seed: int) -> None:
    graph = random_graph(names(count), seed)
    matrix = graph.matrix()
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(Graph.from_matrix("again", graph.clients, matrix).edge_list, graph.edge_list)
    assert torch.equal(
        Graph.from_edges("again", graph.clients, graph.edges()).edge_list, graph.edge_list
    )
    torch.testing.assert_close(graph.degrees, matrix.sum(dim=1))
    torch.testing.assert_close(
        torch.from_numpy(graph.laplacian.toarray()), torch.diag(matrix.sum(dim=1)) - matrix
    )
    places = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(graph.moved(places).matrix()[places][:, places], matrix)
    members = places % 2 == 0
    assert torch.equal(
        graph.among(members).matrix(), matrix * (members[:, None] & members[None, :])
    )


@settings(deadline=None, max_examples=40)
@given(count=st.integers(2, 8), seed=st.integers(0, 2**20), share=st.floats(0, 1))
def test_blending_edge_lists_blends_their_matrices(count: int, seed: int, share: float) -> None:
    one, other = (random_graph(names(count), seed + k).matrix() for k in range(2))
    found = blended(list_of_matrix(one), list_of_matrix(other), share, count)
    assert torch.equal(matrix_of_list(found, count), share * one + (1 - share) * other)


def test_pairs_named_twice_take_the_larger_weight() -> None:
    rows, columns = torch.tensor([2, 0, 1, 0]), torch.tensor([0, 2, 0, 1])
    weights = torch.tensor([0.3, 0.7, 0.0, 0.0], dtype=torch.float64)
    assert joined(rows, columns, weights, 3).tolist() == [[0, 2, 0.7]]


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 8), seed=st.integers(0, 2**20))
def test_trace_with_a_laplacian_is_half_the_weighted_sum_of_squared_distances(
    count: int, seed: int
) -> None:
    """Both forms of inner products, here of sketches that are the vectors themselves.

    More entries than one chunk has.
    """
    graph = random_graph(names(count), seed)
    vectors = torch.randn(count, 150, generator=torch.Generator().manual_seed(seed)).double()
    expected = sum(
        weight * float((vectors[i] - vectors[j]).square().sum()) for (i, j), weight in by_row(graph)
    )
    for products in (ExactProducts(vectors @ vectors.T), SketchedProducts(vectors)):
        assert products.trace(graph.laplacian) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def by_row(graph: Graph) -> list[tuple[list[int], float]]:
    return list(zip(graph.pairs.tolist(), graph.edge_weights.tolist(), strict=True))
