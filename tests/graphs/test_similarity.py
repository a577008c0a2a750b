"""The learned graph: related updates get edges, and nothing else does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmira.graphs import likeness
from fedmira.graphs.edges import NO_EDGES, matrix_of_list
from fedmira.graphs.similarity import (
    FULL_DEGREE,
    centred_cosines,
    nearest_neighbours,
    remember,
    sketched_likeness,
)


def everybody(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bool)


def weights_of(gram: Tensor, trained: Tensor, nearest: int) -> Tensor:
    return matrix_of_list(likeness(gram, trained, nearest).edges, len(gram))


def updates(count: int, seed: int, size: int = 40) -> Tensor:
    return torch.randn(
        count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def test_cosines_equal_those_of_centred_unit_vectors() -> None:
    vectors = updates(6, 0) + 5.0
    vectors[2] *= 1000  # a large update does not bend the mean
    long = vectors
    vectors = long / long.norm(dim=1, keepdim=True)
    centred = vectors - (1 - 2 / 6) * vectors.mean(dim=0)  # the share of six clients
    unit = centred / centred.norm(dim=1, keepdim=True)
    expected = (unit @ unit.T).fill_diagonal_(0)
    torch.testing.assert_close(
        centred_cosines(long @ long.T, everybody(6)), expected, rtol=1e-9, atol=1e-9
    )


def test_the_mean_is_over_trained_clients_only() -> None:
    vectors = updates(6, 1)
    trained = torch.tensor([True, True, False, True, True, False])
    expected = centred_cosines(vectors[trained] @ vectors[trained].T, everybody(4))
    found = centred_cosines(vectors @ vectors.T, trained)
    torch.testing.assert_close(found[trained][:, trained], expected)
    assert not bool(found[~trained].any())
    assert not bool(found[:, ~trained].any())


def test_two_planted_groups_are_recovered_under_a_strong_common_direction() -> None:
    """Every within-group weight is above every other, and no kept edge joins the groups."""
    group = torch.tensor([0, 1] * 5)
    common, directions = updates(1, 2)[0], updates(2, 3)
    vectors = 4 * common + directions[group] + 0.4 * updates(10, 4)
    cosines = centred_cosines(vectors @ vectors.T, everybody(10))
    same = (group[:, None] == group[None, :]) & ~torch.eye(10, dtype=torch.bool)
    different = group[:, None] != group[None, :]
    assert float(cosines[same].min()) > float(cosines[different].max())
    weights = weights_of(vectors @ vectors.T, everybody(10), nearest=3)
    assert float(weights[different].max()) == 0
    assert bool((weights.sum(dim=1) > 0).all())


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_trained_clients_have_no_edge(count: int) -> None:
    vectors = updates(5, 0)
    trained = torch.arange(5) < count
    weights = weights_of(vectors @ vectors.T, trained, nearest=3)
    assert torch.equal(weights, torch.zeros(5, 5, dtype=torch.float64))


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_a_few_related_clients_are_joined_and_a_few_strangers_are_not(count: int) -> None:
    """Orthogonal updates have negative cosines once a share of the mean is out.

    A strong common direction survives it.
    """
    strangers = torch.eye(count, 8, dtype=torch.float64)
    assert not bool(weights_of(strangers @ strangers.T, everybody(count), 3).any())
    relatives = strangers + 4 * torch.ones(8, dtype=torch.float64)
    weights = weights_of(relatives @ relatives.T, everybody(count), 3)
    assert bool((weights.sum(dim=1) > 0).all())


def test_identical_updates_are_all_related() -> None:
    """Half of the common update of four is left.

    Every cosine is 1, three neighbours each, divided by the degree 3.
    """
    vectors = updates(1, 0).expand(4, -1)
    expected = (torch.ones(4, 4, dtype=torch.float64) / 3).fill_diagonal_(0)
    torch.testing.assert_close(weights_of(vectors @ vectors.T, everybody(4), 3), expected)


def test_a_client_whose_update_is_zero_has_degree_zero_and_does_not_shift_the_mean() -> None:
    vectors = updates(6, 5)
    vectors[2] = 0
    weights = weights_of(vectors @ vectors.T, everybody(6), 2)
    without = torch.tensor([0, 1, 3, 4, 5])
    assert not bool(weights[2].any())
    torch.testing.assert_close(
        weights[without][:, without],
        weights_of(vectors[without] @ vectors[without].T, everybody(5), 2),
    )


def test_all_zero_updates_give_an_empty_graph() -> None:
    assert not bool(weights_of(torch.zeros(4, 4, dtype=torch.float64), everybody(4), 3).any())


def test_rows_that_never_trained_are_not_read() -> None:
    vectors = updates(5, 6)
    gram = vectors @ vectors.T
    gram[4] = gram[:, 4] = float("nan")
    trained = torch.tensor([True, True, True, True, False])
    assert bool(torch.isfinite(weights_of(gram, trained, 2)).all())


def test_nearest_neighbours_take_the_largest_and_of_equal_ones_the_first() -> None:
    weights = torch.tensor(
        [[0, 0.5, 0.5, 0.2], [0.5, 0, 0.1, 0], [0.5, 0.1, 0, 0.9], [0.2, 0, 0.9, 0]],
        dtype=torch.float64,
    )
    expected = torch.tensor(
        [[0, 0.5, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 0.9], [0, 0, 0.9, 0]], dtype=torch.float64
    )
    assert torch.equal(nearest_neighbours(weights, 1), expected)
    assert torch.equal(nearest_neighbours(weights, 10), weights)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 9), nearest=st.integers(1, 9), seed=st.integers(0, 2**20))
def test_weights_are_a_graph_of_degrees_up_to_one_and_permute_with_the_clients(
    count: int, nearest: int, seed: int
) -> None:
    vectors = updates(count, seed, size=3)
    gram = vectors @ vectors.T
    weights = weights_of(gram, everybody(count), nearest)
    assert torch.equal(weights, weights.T)
    assert bool((weights >= 0).all())
    assert not bool(weights.diagonal().any())
    if bool(weights.any()):
        assert float(weights.sum(dim=1).max()) <= 1 + 1e-12
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    permuted = weights_of(gram[order][:, order], everybody(count), nearest)
    torch.testing.assert_close(permuted, weights[order][:, order], rtol=1e-7, atol=1e-7)


def test_memory_is_a_moving_average_that_starts_with_the_first_graph() -> None:
    """With memory 0.5 and the same new graph each round the distance to it halves.

    The first graph is taken whole.
    """
    first, later = (
        torch.tensor([[0, 1, 1.0]], dtype=torch.float64),
        torch.tensor([[0, 1, 0.2], [1, 2, 0.4]], dtype=torch.float64),
    )
    graph = remember(NO_EDGES, first, 0.5, 3)
    assert torch.equal(graph, first)
    for round_number in range(1, 5):
        graph = remember(graph, later, 0.5, 3)
        left = 0.5**round_number
        expected = torch.tensor(
            [[0, 1, 0.2 + 0.8 * left], [1, 2, 0.4 * (1 - left)]], dtype=torch.float64
        )
        torch.testing.assert_close(graph, expected, rtol=1e-12, atol=0)
    assert torch.equal(remember(graph, NO_EDGES, 0.5, 3)[:, 2], graph[:, 2] / 2)


def test_memory_forgets_weights_below_the_smallest_share_of_the_largest() -> None:
    old = torch.tensor([[0, 1, 1.0], [0, 2, 3e-6], [1, 2, 1e-6]], dtype=torch.float64)
    new = torch.tensor([[0, 1, 1.0]], dtype=torch.float64)
    kept = remember(old, new, 0.5, 3, smallest_share=1e-6)
    assert kept[:, :2].tolist() == [[0, 1], [0, 2]]
    assert len(remember(old, new, 0.5, 3)) == 3


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(0, 9),
    nearest=st.integers(1, 9),
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 5),
)
def test_sketches_that_are_the_updates_themselves_give_the_exact_graph(
    count: int, nearest: int, seed: int, rows: int
) -> None:
    """Whatever the number of rows in a block."""
    vectors = updates(count, seed, size=12)
    trained = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedmira.graphs.similarity.BLOCK_ROWS", rows)
        found = sketched_likeness(vectors.float(), trained, nearest)
    error = 12**-0.5  # of cosines between sketches of 12 numbers
    expected = likeness(vectors @ vectors.T, trained, nearest, error)
    clear = expected.edges[:, 2] > 2e-3  # others may be on either side of the least weight
    for row, column, weight in expected.edges[clear].tolist():
        near = (found.edges[:, 0] == row) & (found.edges[:, 1] == column)
        assert float(found.edges[near, 2]) == pytest.approx(weight, abs=1e-5)
    assert abs(len(found.edges) - int(clear.sum())) <= int((~clear).sum()) + 1
    figures = [(each.noise, each.largest, each.mean) for each in (found, expected)]
    assert figures[0] == pytest.approx(figures[1], abs=1e-5)


def test_equal_and_zero_sketches_are_handled_like_equal_and_zero_updates() -> None:
    """Half of the common update of four is left, so all are related.

    A fifth whose update is zero takes no part.
    """
    vectors = torch.cat(
        [updates(1, 0).expand(4, -1), torch.zeros(1, 40, dtype=torch.float64)]
    ).float()
    edges = sketched_likeness(vectors, everybody(5), 3).edges
    assert edges[:, :2].tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    torch.testing.assert_close(
        edges[:, 2], torch.full((6,), 1 / 3, dtype=torch.float64), rtol=1e-5, atol=0
    )
    assert len(sketched_likeness(torch.zeros(4, 8), everybody(4), 2).edges) == 0


def test_weights_are_what_cosines_are_worth_beyond_their_noise() -> None:
    """Two relatives at a cosine of 0.3 among strangers, whose noise is known exactly.

    Four strangers have the cosines +-0.05 among themselves, the relatives 0 with all others.
    """
    cosines = torch.eye(6, dtype=torch.float64)
    cosines[0, 1] = cosines[1, 0] = 0.3
    for one, other, sign in [(2, 3, 1), (3, 4, -1), (4, 5, 1), (5, 2, -1)]:
        cosines[one, other] = cosines[other, one] = 0.05 * sign
    found = likeness(cosines, everybody(6), 3)
    assert (found.noise, found.largest) == pytest.approx((0.05, 0.3))
    assert found.mean == pytest.approx(0.3 / 15)
    centred = float(centred_cosines(cosines, everybody(6))[0, 1])
    (edge,) = found.edges.tolist()
    assert edge == pytest.approx([0, 1, (centred - 2 * 0.05) / FULL_DEGREE])


def test_independent_updates_are_left_alone() -> None:
    """Of 44 clients in 4,000 dimensions the best cosine is about 0.05: the mean degree is none."""
    vectors = updates(44, 7, size=4000)
    found = likeness(vectors @ vectors.T, everybody(44), 3)
    assert 0.04 < found.largest < 0.08
    assert found.noise == pytest.approx(4000**-0.5, rel=0.1)
    assert float(matrix_of_list(found.edges, 44).sum(dim=1).mean()) < 0.02
