"""Weights in blocks: planted ones are found, and both halves are what the objective asks for."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmira.config import GraphSettings
from fedmira.errors import ConfigError
from fedmira.graphs import (
    BlocksGraph,
    ExactProducts,
    InnerProducts,
    LearnedGraph,
    SketchedProducts,
    graph_source,
    in_blocks,
)
from fedmira.graphs.blocks import _distances, _laplacian, _largest_gap, _projector

BLOCK_OF = torch.arange(9) // 3
WITHIN = BLOCK_OF[:, None] == BLOCK_OF[None, :]


def symmetric(values: Tensor) -> Tensor:
    upper = torch.triu(values, diagonal=1)
    return upper + upper.T


def uniform(count: int, seed: int, low: float, high: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(count, count, generator=generator, dtype=torch.float64)
    return symmetric(low + (high - low) * drawn)


def planted(seed: int) -> Tensor:
    """Nine clients in three blocks: about 0.8 within, 0.15 +- 0.05 across."""
    return torch.where(WITHIN, uniform(9, seed, 0.75, 0.85), uniform(9, seed + 1, 0.1, 0.2))


def lowest_sum(weights: Tensor, count: int) -> float:
    return float(torch.linalg.eigvalsh(_laplacian(weights))[:count].sum())


def cost(weights: Tensor, given: Tensor, count: int, strength: float) -> float:
    """What is minimized: squares over pairs, each once, and the price of the lowest eigenvalues."""
    squares = float((weights - given).square().sum()) / 2
    return squares / 2 + strength / 2 * lowest_sum(weights, count)


@pytest.mark.parametrize("seed", range(0, 20, 2))
@pytest.mark.parametrize("blocks", [0, 3])
def test_planted_blocks_are_parted_and_weights_within_them_stay(seed: int, blocks: int) -> None:
    """At 0.15 across, L has the eigenvalues 0, 9 * 0.15 twice, and 3 * 0.8 + 6 * 0.15 six times.

    Between blocks of three D is 1/3 + 1/3, and half of it is above 0.2, so one turn cuts all.
    """
    given = planted(seed)
    found = in_blocks(given, blocks, 1.0)
    assert found.count == 3
    assert found.before == pytest.approx(2 * 9 * 0.15, abs=0.35)
    assert 0.15 < float(given[~WITHIN].max()) <= 0.2
    assert found.after == pytest.approx(0, abs=1e-12)
    assert not found.weights[~WITHIN].any()
    pairs = WITHIN & ~torch.eye(9, dtype=torch.bool)
    assert float(found.weights[pairs].mean()) == pytest.approx(float(given[pairs].mean()), abs=0.01)
    once = (given - _distances(_projector(_laplacian(given), 3)) / 2).clamp_min(0)
    assert not once[~WITHIN].any()


def bridged_updates() -> Tensor:
    """Nine unit updates whose cosines are 0.7 within blocks, 0.3 across, and 0.55 on one bridge."""
    cosines = torch.where(WITHIN, 0.7, 0.3).to(torch.float64).fill_diagonal_(1)
    cosines[0, 3] = cosines[3, 0] = 0.55
    values, vectors = torch.linalg.eigh(cosines)
    assert float(values.min()) > 0
    return vectors * values.sqrt()


@pytest.mark.parametrize(
    "products",
    [
        ExactProducts(bridged_updates() @ bridged_updates().T),
        SketchedProducts(torch.cat([bridged_updates().float(), torch.zeros(9, 10**5)], dim=1)),
    ],
    ids=["exact", "sketched"],
)
def test_strength_zero_is_the_similarity_graph_and_a_price_cuts_a_bridge(
    products: InnerProducts,
) -> None:
    everybody, nothing = torch.ones(9, dtype=torch.bool), torch.zeros(0, 3, dtype=torch.float64)
    plain = LearnedGraph().update(nothing, products, everybody)
    free = BlocksGraph(strength=0.0).update(nothing, products, everybody)
    torch.testing.assert_close(free.memory, plain.memory, rtol=1e-5, atol=1e-6)
    assert [0.0, 3.0] in plain.memory[:, :2].tolist()
    assert free.figures["eigenvalues_before"] == free.figures["eigenvalues_after"] > 0.01
    priced = BlocksGraph(strength=1.0).update(nothing, products, everybody)
    assert priced.figures["blocks"] == 3
    assert priced.figures["eigenvalues_after"] == pytest.approx(0, abs=1e-6)
    assert [0.0, 3.0] not in priced.memory[:, :2].tolist() and len(priced.memory) == 9


@settings(deadline=None, max_examples=40)
@given(count=st.integers(2, 9), seed=st.integers(0, 2**20), data=st.data())
def test_the_trace_is_the_sum_of_weights_times_distances_and_of_the_lowest_eigenvalues(
    count: int, seed: int, data: st.DataObject
) -> None:
    weights = uniform(count, seed, -0.3, 1).clamp_min(0)
    blocks = data.draw(st.integers(1, count))
    projector = _projector(_laplacian(weights), blocks)
    trace = float((_laplacian(weights) * projector).sum())
    assert float(projector.trace()) == pytest.approx(blocks)
    eigenvalues = torch.linalg.eigvalsh(projector)
    assert float(eigenvalues.min()) > -1e-9 and float(eigenvalues.max()) < 1 + 1e-9
    assert trace == pytest.approx(float((weights * _distances(projector)).sum()) / 2, abs=1e-9)
    assert trace == pytest.approx(lowest_sum(weights, blocks), abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(count=st.integers(4, 8), seed=st.integers(0, 2**20), strength=st.floats(0.05, 2))
def test_what_is_found_costs_no_more_than_what_was_given(
    count: int, seed: int, strength: float
) -> None:
    weights = uniform(count, seed, -0.2, 1).clamp_min(0)
    weights[0, 1:] = weights[1:, 0] = 0.1  # nobody is alone, so all are counted
    found = in_blocks(weights, 2, strength)
    assert found.count == 2
    assert cost(found.weights, weights, 2, strength) <= cost(weights, weights, 2, strength) + 1e-9
    assert found.before == pytest.approx(lowest_sum(weights, 2), abs=1e-9)
    assert found.after == pytest.approx(max(0, lowest_sum(found.weights, 2)), abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**20), strength=st.floats(0.05, 2), step=st.floats(1e-4, 0.3))
def test_for_given_eigenvectors_the_weights_are_the_least_of_their_half(
    seed: int, strength: float, step: float
) -> None:
    given_weights = uniform(6, seed, -0.2, 1).clamp_min(0)
    distances = _distances(_projector(_laplacian(given_weights), 2))

    def half(weights: Tensor) -> float:
        squares, price = (weights - given_weights).square(), strength * weights * distances
        return float((squares + price).sum())

    least = (given_weights - strength / 2 * distances).clamp_min(0)
    other = (least + symmetric(uniform(6, seed + 1, -step, step))).clamp_min(0)
    assert half(least) <= half(other) + 1e-12


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**20), order=st.permutations(range(7)), blocks=st.integers(0, 4))
def test_a_permutation_of_the_clients_permutes_the_weights(
    seed: int, order: list[int], blocks: int
) -> None:
    given_weights = uniform(7, seed, -0.3, 1).clamp_min(0)
    found = in_blocks(given_weights, blocks, 0.4)
    moved = in_blocks(given_weights[order][:, order], blocks, 0.4)
    assert moved.count == found.count
    torch.testing.assert_close(moved.weights, found.weights[order][:, order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("blocks", [2, 3])
def test_equal_eigenvalues_decide_nothing_by_chance(blocks: int) -> None:
    """All pairs alike: every eigenvalue but the first is n, so no pair is favoured, whoever asks.

    U is the projector on 1 and the rest by shares (c - 1) / (n - 1), and D is twice that share.
    """
    alike = symmetric(torch.ones(6, 6, dtype=torch.float64))
    found = in_blocks(alike, blocks, 0.5).weights
    share = (blocks - 1) / 5
    assert float(found[0, 1]) == pytest.approx(1 - 0.5 / 2 * 2 * share)
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 97):
        torch.testing.assert_close(
            in_blocks(alike[list(order)][:, list(order)], blocks, 0.5).weights, found
        )


def test_the_count_is_where_eigenvalues_part_and_at_most_the_root_of_the_clients() -> None:
    assert _largest_gap(torch.tensor([0.0, 0.1, 0.2, 3.0, 3.1, 3.2, 9.0, 9, 9]).double()) == 3
    assert _largest_gap(torch.tensor([0.0, 2.0, 2.1, 2.2]).double()) == 1
    assert _largest_gap(torch.tensor([0.0, 5.0]).double()) == 1


def test_clients_without_a_weight_are_no_blocks_to_be_counted() -> None:
    apart = torch.zeros(12, 12, dtype=torch.float64)
    apart[:9, :9] = planted(0)
    found = in_blocks(apart, 3, 1.0)
    assert found.count == 3 and not found.weights[9:].any()
    torch.testing.assert_close(found.weights[:9, :9], in_blocks(planted(0), 3, 1.0).weights)
    assert in_blocks(torch.zeros(4, 4, dtype=torch.float64), 2, 1.0).count == 0


def test_too_many_clients_and_too_many_blocks_are_refused() -> None:
    three = GraphSettings(kind="blocks", blocks=3)
    with pytest.raises(ConfigError, match="blocks = 3.*4 clients make at most 2"):
        graph_source(three, ("a", "b", "c", "d"), {}, 0)
    many = tuple(f"client-{k}" for k in range(2001))
    with pytest.raises(ConfigError, match="2,001 clients.*at most 2,000.*similarity"):
        graph_source(GraphSettings(kind="blocks"), many, {}, 0)
    built = graph_source(GraphSettings(kind="blocks", strength=0.3, nearest=2), many[:5], {}, 0)
    assert built == BlocksGraph(nearest=2, blocks=0, strength=0.3)
