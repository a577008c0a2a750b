"""The matrix P of MIRA's server step against the Laplacian."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmira.graphs import Graph, random_graph, uniform_graph
from fedmira.methods import Mira, mixing_matrix


def names(count: int) -> tuple[str, ...]:
    return tuple(f"client-{k}" for k in range(count))


def members(count: int, chosen: object = None) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(range(count)) if chosen is None else list(chosen)] = True  # type: ignore[call-overload]
    return mask


def laplacian(graph: Graph) -> Tensor:
    return torch.from_numpy(graph.laplacian.toarray())


def graph_of(weights: Tensor) -> Graph:
    return Graph.from_matrix("file", names(len(weights)), weights)


def same_rows(count: int) -> Tensor:
    return torch.full((count,), 100.0, dtype=torch.float64)


def test_with_everybody_in_the_round_it_is_identity_minus_gamma_laplacian() -> None:
    graph = random_graph(names(7), 0)
    mixing = mixing_matrix(
        Mira(server_step=0.05, size_scale=0), graph, members(7), members(7), same_rows(7)
    )
    torch.testing.assert_close(
        mixing.matrix(),
        torch.eye(7, dtype=torch.float64) - 0.05 * laplacian(graph),
        rtol=0,
        atol=1e-15,
    )
    assert mixing.server_step == 0.05
    assert not mixing.guarded


def test_no_neighbour_is_more_than_its_share_of_what_a_client_gets() -> None:
    """Of the weights 8, 2 and 1 with at least two: the largest is cut to the second."""
    weights = torch.zeros(4, 4, dtype=torch.float64)
    for place, weight in enumerate((8.0, 2.0, 1.0), start=1):
        weights[0, place] = weights[place, 0] = weight
    graph, strength = graph_of(weights), Mira(server_step=0.05, size_scale=0)
    mixing = mixing_matrix(strength, graph, members(4), members(4), same_rows(4), least_mixed=2)
    assert mixing.row(0) == ([0, 1, 2, 3], pytest.approx([0.75, 0.1, 0.1, 0.05]))
    # The others have one neighbour each, which would be all that they get.
    assert mixing.pulls[1:].tolist() == [0, 0, 0]


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8), st.integers(2, 5))
def test_the_largest_share_is_one_over_the_least_number(values: list[float], least: int) -> None:
    count = len(values) + 1
    weights = torch.zeros(count, count, dtype=torch.float64)
    weights[0, 1:] = weights[1:, 0] = torch.tensor(values, dtype=torch.float64)
    mixing = mixing_matrix(
        Mira(coupling=1.0, size_scale=0),
        graph_of(weights),
        members(count),
        members(count),
        same_rows(count),
        least_mixed=least,
    )
    pull = float(mixing.pulls[0])
    assert (pull > 0) == (len(values) >= least)
    if pull:
        assert max(mixing.row(0)[1][1:]) <= pull / least * (1 + 1e-9)


def test_coupling_is_the_pull_of_the_client_with_the_largest_degree() -> None:
    graph = random_graph(names(7), 0)
    mixing = mixing_matrix(
        Mira(coupling=0.6, size_scale=0), graph, members(7), members(7), same_rows(7)
    )
    assert mixing.server_step == pytest.approx(0.6 / float(graph.degrees.max()))
    assert float(mixing.pulls.max()) == pytest.approx(0.6)
    torch.testing.assert_close(mixing.pulls, 0.6 * graph.degrees / graph.degrees.max())


def test_full_coupling_is_not_a_guarded_step() -> None:
    for seed in range(10):
        graph = random_graph(names(9), seed)
        mixing = mixing_matrix(
            Mira(coupling=1, size_scale=0), graph, members(9), members(9), same_rows(9)
        )
        assert not mixing.guarded
        assert float(mixing.pulls.max()) == pytest.approx(1)
        assert float(mixing.matrix().min()) >= 0


def test_weights_of_one_over_k_and_step_one_give_everybody_the_mean() -> None:
    """a_kl = 1/K, gamma = 1: P_kk = 1 - (K - 1)/K = 1/K, so all rows are 1/K: FedAvg."""
    graph = graph_of(uniform_graph(names(5)).matrix() / 5)
    mixing = mixing_matrix(
        Mira(server_step=1.0, size_scale=0), graph, members(5), members(5), same_rows(5)
    )
    torch.testing.assert_close(
        mixing.matrix(), torch.full((5, 5), 0.2, dtype=torch.float64), rtol=0, atol=1e-15
    )


def test_two_clients_keep_one_minus_two_gamma_a_of_their_difference() -> None:
    graph = graph_of(torch.tensor([[0, 0.7], [0.7, 0]], dtype=torch.float64))
    mixing = mixing_matrix(
        Mira(server_step=0.3, size_scale=0), graph, members(2), members(2), same_rows(2)
    )
    values = mixing.matrix() @ torch.tensor([1.0, 5.0], dtype=torch.float64)
    assert float(values[1] - values[0]) == pytest.approx((1 - 2 * 0.3 * 0.7) * 4)


def test_a_step_that_overshoots_is_cut_so_that_the_strongest_pull_is_one() -> None:
    graph = random_graph(names(6), 1)
    mixing = mixing_matrix(
        Mira(server_step=10.0, size_scale=0), graph, members(6), members(6), same_rows(6)
    )
    assert mixing.guarded
    assert mixing.server_step == pytest.approx(1 / float(graph.degrees.max()))
    assert float(mixing.pulls.max()) == pytest.approx(1)
    assert float(mixing.matrix().min()) >= 0
    torch.testing.assert_close(mixing.matrix().sum(dim=1), torch.ones(6, dtype=torch.float64))


def test_rescaled_neighbours_average_to_the_full_laplacian_over_all_cohorts() -> None:
    """Over all cohorts of 3 of 6 that hold k, the mean of (I - P)_k is gamma L_k.

    Fresh neighbours give (3 - 1)/(6 - 1) of it.
    """
    graph = random_graph(names(6), 2)
    gamma = 0.01
    for policy, share in (("rescaled", 1.0), ("fresh", 2 / 5)):
        chosen = Mira(server_step=gamma, size_scale=0, neighbours=policy)
        for k in range(6):
            cohorts = [cohort for cohort in combinations(range(6), 3) if k in cohort]
            rows = [
                mixing_matrix(chosen, graph, members(6, cohort), members(6), same_rows(6)).matrix()[
                    k
                ]
                for cohort in cohorts
            ]
            moved = torch.eye(6, dtype=torch.float64)[k] - torch.stack(rows).mean(dim=0)
            torch.testing.assert_close(
                moved, share * gamma * laplacian(graph)[k], rtol=1e-9, atol=1e-12
            )


def test_rescaling_of_a_small_cohort_is_guarded() -> None:
    """Two of six clients with coupling 1 on the uniform graph: pull 1/5 * (6 - 1)/(2 - 1) = 1.

    On weights 1 and gamma 0.3: 1.5.
    """
    graph = uniform_graph(names(6))
    cohort = members(6, [1, 4])
    even = mixing_matrix(
        Mira(coupling=1, size_scale=0, neighbours="rescaled"),
        graph,
        cohort,
        members(6),
        same_rows(6),
    )
    assert not even.guarded
    assert float(even.pulls[1]) == pytest.approx(1)
    cut = mixing_matrix(
        Mira(server_step=0.3, size_scale=0, neighbours="rescaled"),
        graph,
        cohort,
        members(6),
        same_rows(6),
    )
    assert cut.guarded
    assert cut.server_step == pytest.approx(0.2)


def test_rescaled_with_one_client_left_in_the_round_moves_nothing() -> None:
    chosen = Mira(neighbours="rescaled")
    mixing = mixing_matrix(
        chosen, uniform_graph(names(4)), members(4, [2]), members(4), same_rows(4)
    )
    assert torch.equal(mixing.matrix(), torch.eye(4, dtype=torch.float64))


def test_only_clients_that_have_trained_are_neighbours() -> None:
    graph = uniform_graph(names(5))
    stale = mixing_matrix(
        Mira(size_scale=0), graph, members(5, [0]), members(5, [0, 2, 3]), same_rows(5)
    )
    assert torch.nonzero(stale.matrix()[0]).flatten().tolist() == [0, 2, 3]
    fresh = mixing_matrix(
        Mira(size_scale=0, neighbours="fresh"),
        graph,
        members(5, [0, 3]),
        members(5, [0, 2, 3]),
        same_rows(5),
    )
    assert torch.nonzero(fresh.matrix()[0]).flatten().tolist() == [0, 3]
    assert torch.equal(fresh.matrix()[1], torch.eye(5, dtype=torch.float64)[1])


def test_size_aware_steps_shrink_with_the_clients_own_rows() -> None:
    """kappa_k = 64 / (64 + n): 0.8, 2/3, 1/2, 1/3 for 16, 32, 64, 128 rows."""
    rows = torch.tensor([16, 32, 64, 128], dtype=torch.float64)
    mixing = mixing_matrix(Mira(), uniform_graph(names(4)), members(4), members(4), rows)
    torch.testing.assert_close(
        mixing.pulls, torch.tensor([0.8, 2 / 3, 1 / 2, 1 / 3], dtype=torch.float64)
    )


def test_a_client_without_neighbours_is_left_alone() -> None:
    graph = uniform_graph(names(4)).among(torch.tensor([True, True, False, True]))
    mixing = mixing_matrix(Mira(), graph, members(4), members(4), same_rows(4))
    assert torch.equal(mixing.matrix()[2], torch.eye(4, dtype=torch.float64)[2])
    assert float(mixing.pulls[2]) == 0


def test_no_edges_no_step() -> None:
    for chosen in (Mira(), Mira(server_step=3.0)):
        mixing = mixing_matrix(
            chosen, Graph.from_edges("file", names(3), []), members(3), members(3), same_rows(3)
        )
        assert mixing.server_step == 0
        assert torch.equal(mixing.matrix(), torch.eye(3, dtype=torch.float64))


def test_powers_of_the_step_lead_to_consensus_on_a_connected_graph() -> None:
    graph = random_graph(names(6), 3)
    chosen = Mira(coupling=0.9, size_scale=0)
    matrix = mixing_matrix(chosen, graph, members(6), members(6), same_rows(6)).matrix()
    torch.testing.assert_close(
        torch.linalg.matrix_power(matrix, 300), torch.full((6, 6), 1 / 6, dtype=torch.float64)
    )


@settings(deadline=None, max_examples=60)
@given(data=st.data(), count=st.integers(2, 7), seed=st.integers(0, 2**20))
def test_rows_are_convex_combinations_whatever_is_set(
    data: st.DataObject, count: int, seed: int
) -> None:
    chosen = Mira(
        server_step=data.draw(st.one_of(st.none(), st.floats(0, 5))),
        size_scale=data.draw(st.sampled_from([0.0, 1.0, 64.0])),
        neighbours=data.draw(st.sampled_from(["fresh", "rescaled", "stale"])),
    )
    cohort = members(count, data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    trained = cohort | members(count, data.draw(st.sets(st.integers(0, count - 1))))
    rows = torch.tensor(
        data.draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count)),
        dtype=torch.float64,
    )
    graph = random_graph(names(count), seed)
    mixing = mixing_matrix(chosen, graph, cohort, trained, rows)
    assert bool((mixing.matrix() >= 0).all())
    torch.testing.assert_close(
        mixing.matrix().sum(dim=1), torch.ones(count, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert torch.equal(mixing.matrix()[~cohort], torch.eye(count, dtype=torch.float64)[~cohort])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    permuted = mixing_matrix(
        chosen,
        graph_of(graph.matrix()[order][:, order]),
        cohort[order],
        trained[order],
        rows[order],
    )
    torch.testing.assert_close(
        permuted.matrix(), mixing.matrix()[order][:, order], rtol=1e-12, atol=1e-12
    )
    if chosen.size_scale == 0 and bool(cohort.all()):
        torch.testing.assert_close(
            mixing.matrix().sum(dim=0), torch.ones(count, dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_a_row_lists_what_a_client_is_made_of() -> None:
    """Path 0 - 1 - 2, coupling 1.

    Client 1 takes half of each neighbour and nothing of itself, client 0 half of its only
    neighbour.
    """
    graph = Graph.from_edges(
        "file", names(4), [("client-0", "client-1", 1.0), ("client-1", "client-2", 1.0)]
    )
    mixing = mixing_matrix(
        Mira(coupling=1, size_scale=0),
        graph,
        members(4, [0, 1, 3]),
        members(4),
        same_rows(4),
    )
    assert mixing.row(0) == ([0, 1], [0.5, 0.5])
    assert mixing.row(1) == ([0, 1, 2], [0.5, 0.0, 0.5])
    assert mixing.row(2) == ([2], [1.0])
    assert mixing.row(3) == ([3], [1.0])


def test_only_edges_of_the_cohort_are_kept() -> None:
    """Ten thousand clients in a ring, three of them in the round: two entries each."""
    clients = names(10_000)
    graph = Graph.from_edges(
        "file", clients, zip(clients, clients[1:] + clients[:1], [1.0] * 10_000, strict=True)
    )
    mixing = mixing_matrix(
        Mira(size_scale=0),
        graph,
        members(10_000, [0, 7, 9999]),
        members(10_000),
        same_rows(10_000),
    )
    assert mixing.rows.tolist() == [0, 0, 7, 7, 9999, 9999]
    assert mixing.columns.tolist() == [1, 9999, 6, 8, 0, 9998]
    assert mixing.steps.tolist() == [0.5] * 6
