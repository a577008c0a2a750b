"""Paired differences: who is beyond noise, and how wide intervals are.

As wide as the spread over clients and seeds makes them.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedmira.report.paired import (
    NOISE_RULE,
    ClientDifference,
    bootstrap_interval,
    errors_of_noise,
    pair,
)


@pytest.mark.parametrize(
    ("own", "error", "seeds", "expected"),
    [
        (1.95, 0.0, 1, "better"),
        (1.97, 0.0, 1, "equal"),  # 1.5 % lower
        (2.03, 0.0, 1, "equal"),
        (2.05, 0.0, 1, "worse"),
        (1.97, 0.001, 3, "equal"),
        (1.80, 0.2 / 4.31, 3, "better"),  # by 0.2; t is 4.303 with 2 degrees of freedom
        (1.80, 0.2 / 4.29, 3, "equal"),
        (2.20, 0.2 / 4.31, 3, "worse"),
        (1.80, 0.2 / 12.8, 2, "better"),  # 12.706 with 1
        (1.80, 0.2 / 12.6, 2, "equal"),
        (1.80, 0.2 / 2.3, 9, "equal"),  # 2.306 with 8
    ],
)
def test_a_client_is_better_or_worse_beyond_two_percent_and_the_quantile_of_t(
    own: float, error: float, seeds: int, expected: str
) -> None:
    assert ClientDifference("a", own, 2.0, error, seeds).verdict == expected


@pytest.mark.parametrize("seeds", [2, 3, 5, 30])
def test_of_clients_without_a_difference_one_in_twenty_is_beyond_the_noise_of_its_seeds(
    seeds: int,
) -> None:
    assert errors_of_noise(seeds) == pytest.approx(stats.t.ppf(0.975, seeds - 1), rel=1e-12)
    draws = np.random.default_rng(seeds).normal(size=(40_000, seeds))
    beyond = abs(draws.mean(axis=1)) > errors_of_noise(seeds) * draws.std(
        axis=1, ddof=1
    ) / math.sqrt(seeds)
    assert beyond.mean() == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 40_000))
    assert errors_of_noise(1) == 0


def test_the_rule_tells_the_quantiles() -> None:
    assert "(12.7 with 2 seeds, 4.3 with 3 seeds, 2.78 with 5 seeds)" in NOISE_RULE


def test_clients_are_paired_by_seed_and_averaged() -> None:
    own = {0: {"a": 1.0, "b": 3.0}, 1: {"a": 1.2, "b": 3.0}}
    other = {0: {"a": 1.5, "b": 2.0}, 1: {"a": 1.5, "b": 2.4}}
    found = pair(own, other)
    assert found is not None
    # a: -0.5 and -0.3, mean -0.4, standard deviation 0.2 / sqrt(2) of two values, so standard error
    # 0.1; b: 1.0 and 0.6
    assert found.clients["a"].difference == pytest.approx(-0.4)
    assert found.clients["a"].error == pytest.approx(0.1)
    assert found.clients["a"].relative == pytest.approx(-0.4 / 1.5)
    assert found.clients["b"].error == pytest.approx(0.2)
    assert found.difference == pytest.approx((-0.5 - 0.3 + 1.0 + 0.6) / 4)
    assert found.low <= found.difference <= found.high
    # with two seeds 12.7 standard errors are noise, more than either difference
    assert (found.count("better"), found.count("equal"), found.count("worse"), found.seeds) == (
        0,
        2,
        0,
        2,
    )


def test_differences_that_hardly_vary_over_the_seeds_are_beyond_noise() -> None:
    own = {seed: {"a": 1.0 + 0.01 * seed, "b": 3.0, "c": 2.0 + seed} for seed in range(3)}
    other = {seed: {"a": 1.5, "b": 2.0 + 0.01 * seed, "c": 2.1} for seed in range(3)}
    found = pair(own, other)
    assert found is not None and {
        client: each.verdict for client, each in found.clients.items()
    } == {
        "a": "better",  # by 0.49; 4.3 standard errors of 0.01 / sqrt(3) are 0.025
        "b": "worse",
        "c": "equal",  # 0.9 worse, and 4.3 standard errors of 1 / sqrt(3) are 2.5
    }


def test_what_only_one_of_them_measured_is_left_out() -> None:
    found = pair(
        {0: {"a": 1.0, "b": 1.0}, 1: {"a": 1.0}},
        {0: {"a": 1.0, "b": 1.0}, 1: {"a": 2.0, "b": 1.0}, 2: {"a": 9.0}},
    )
    assert found is not None and list(found.clients) == ["a"] and found.seeds == 2
    assert found.difference == -0.5
    assert (
        pair({0: {"a": 1.0}}, {1: {"a": 1.0}}) is None
        and pair({0: {"a": 1.0}}, {0: {"b": 1.0}}) is None
        and pair({}, {}) is None
    )


def test_one_seed_has_no_standard_error() -> None:
    found = pair({3: {"a": 1.0}}, {3: {"a": 1.5}})
    assert found is not None and found.clients["a"].error == 0
    assert (found.low, found.difference, found.high) == (-0.5, -0.5, -0.5), (
        "one client and one seed can only be drawn again"
    )


def test_the_interval_is_as_wide_as_clients_and_seeds_vary() -> None:
    """d = a_k + b_s, drawn independently.

    The variance of a resampled mean is var(a) / K + var(b) / S.
    """
    draw = np.random.default_rng(5)
    of_client, of_seed = draw.normal(0.3, 1.0, 200), draw.normal(0.0, 0.2, 30)
    differences = of_client[:, None] + of_seed[None, :]
    low, high = bootstrap_interval(differences)
    deviation = math.sqrt(of_client.var() / 200 + of_seed.var() / 30)
    assert (low + high) / 2 == pytest.approx(differences.mean(), abs=0.05 * deviation)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.05)


def test_clients_of_one_pool_are_drawn_together() -> None:
    """One seed, pools of 5, 3 and 1 clients that are alike within.

    A mean is that of three pools, drawn 27 ways, weighted by size.
    """
    sizes, values = (5, 3, 1), (0.0, 1.0, -2.0)
    differences = np.repeat(values, sizes)[:, None]
    drawn = [
        np.average([values[k] for k in draw], weights=[sizes[k] for k in draw])
        for draw in itertools.product(range(3), repeat=3)
    ]
    expected = np.quantile(drawn, [0.05, 0.95], method="inverted_cdf")
    assert bootstrap_interval(
        differences, np.repeat(["x", "y", "z"], sizes).tolist(), level=0.9
    ) == pytest.approx(tuple(expected))


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_pools_of_one_client_each_change_nothing(values: list[float]) -> None:
    differences = np.array(values)[:, None]
    pools = [f"pool {k}" for k in range(len(values))]
    assert bootstrap_interval(differences, pools, resamples=200) == bootstrap_interval(
        differences, resamples=200
    )


def test_intervals_of_pooled_clients_hold_the_mean_as_often_as_they_say() -> None:
    """Clients = pool + own part, 30 pools of 5.

    Drawn one by one they would pass for 150 independent clients.
    """
    draw, pools = np.random.default_rng(1), [f"pool {k // 5}" for k in range(150)]
    held = {"pools": 0, "clients": 0}
    for _ in range(200):
        differences = (np.repeat(draw.normal(size=30), 5) + draw.normal(0, 0.3, 150))[:, None]
        for name, given_pools in (("pools", pools), ("clients", None)):
            low, high = bootstrap_interval(differences, given_pools, resamples=400)
            held[name] += low <= 0 <= high
    assert (
        held["pools"] >= 0.89 * 200
    )  # 0.95 less three standard errors of 200 trials, and what 30 pools cost
    assert held["clients"] <= 0.7 * 200


def test_paired_clients_of_one_pool_widen_the_interval() -> None:
    own = {0: {f"{pool}-{k}": 1.0 + (pool == "b") for pool in "ab" for k in range(20)}}
    other = {0: dict.fromkeys(own[0], 1.5)}
    alone, together = pair(own, other), pair(own, other, {client: client[0] for client in own[0]})
    assert (
        alone is not None and together is not None and alone.difference == together.difference == 0
    )
    assert (together.low, together.high) == (-0.5, 0.5), "both draws may be of one pool"
    assert -0.2 < alone.low < alone.high < 0.2


def test_a_higher_level_is_wider_and_many_clients_fit_into_memory() -> None:
    differences = np.random.default_rng(2).normal(size=(100_000, 2))
    narrow, wide = (
        bootstrap_interval(differences, resamples=100, level=0.5),
        bootstrap_interval(differences, resamples=100),
    )
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8), st.floats(-3, 3))
def test_the_interval_moves_with_the_differences_and_is_the_same_again(
    values: list[float], by: float
) -> None:
    differences = np.array(values)[:, None]
    low, high = bootstrap_interval(differences, resamples=200)
    assert (low, high) == bootstrap_interval(differences, resamples=200)
    assert bootstrap_interval(differences + by, resamples=200) == pytest.approx(
        (low + by, high + by), abs=1e-12
    )
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
