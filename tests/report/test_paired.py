"""Paired differences: who is beyond noise, and intervals that are as wide as the spread over clients and seeds makes them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmira.report.paired import ClientDifference, bootstrap_interval, pair


@pytest.mark.parametrize(
    ("own", "error", "expected"),
    [
        (1.95, 0.0, "better"),
        (1.97, 0.0, "equal"),  # 1.5 % lower
        (2.03, 0.0, "equal"),
        (2.05, 0.0, "worse"),
        (1.80, 0.11, "equal"),  # 10 % lower, yet less than two standard errors of 0.11
        (1.80, 0.09, "better"),
        (2.20, 0.09, "worse"),
    ],
)
def test_a_client_is_better_or_worse_beyond_two_percent_and_two_standard_errors(own: float, error: float, expected: str) -> None:
    assert ClientDifference("a", own, 2.0, error).verdict == expected


def test_clients_are_paired_by_seed_and_averaged() -> None:
    own = {0: {"a": 1.0, "b": 3.0}, 1: {"a": 1.2, "b": 3.0}}
    other = {0: {"a": 1.5, "b": 2.0}, 1: {"a": 1.5, "b": 2.4}}
    found = pair(own, other)
    assert found is not None
    # a: -0.5 and -0.3, mean -0.4, standard deviation 0.2 / sqrt(2) of two values, so standard error 0.1; b: 1.0 and 0.6
    assert found.clients["a"].difference == pytest.approx(-0.4)
    assert found.clients["a"].error == pytest.approx(0.1)
    assert found.clients["a"].relative == pytest.approx(-0.4 / 1.5)
    assert found.clients["b"].error == pytest.approx(0.2)
    assert found.difference == pytest.approx((-0.5 - 0.3 + 1.0 + 0.6) / 4)
    assert found.low <= found.difference <= found.high
    assert (found.count("better"), found.count("equal"), found.count("worse"), found.seeds) == (1, 0, 1, 2)


def test_what_only_one_of_them_measured_is_left_out() -> None:
    found = pair({0: {"a": 1.0, "b": 1.0}, 1: {"a": 1.0}}, {0: {"a": 1.0, "b": 1.0}, 1: {"a": 2.0, "b": 1.0}, 2: {"a": 9.0}})
    assert found is not None and list(found.clients) == ["a"] and found.seeds == 2
    assert found.difference == -0.5
    assert pair({0: {"a": 1.0}}, {1: {"a": 1.0}}) is None and pair({0: {"a": 1.0}}, {0: {"b": 1.0}}) is None and pair({}, {}) is None


def test_one_seed_has_no_standard_error() -> None:
    found = pair({3: {"a": 1.0}}, {3: {"a": 1.5}})
    assert found is not None and found.clients["a"].error == 0
    assert (found.low, found.difference, found.high) == (-0.5, -0.5, -0.5), "one client and one seed can only be drawn again"


def test_the_interval_is_as_wide_as_clients_and_seeds_vary() -> None:
    """d = a_k + b_s, drawn independently: the variance of a resampled mean is var(a) / K + var(b) / S."""
    draw = np.random.default_rng(5)
    of_client, of_seed = draw.normal(0.3, 1.0, 200), draw.normal(0.0, 0.2, 30)
    differences = of_client[:, None] + of_seed[None, :]
    low, high = bootstrap_interval(differences)
    deviation = math.sqrt(of_client.var() / 200 + of_seed.var() / 30)
    assert (low + high) / 2 == pytest.approx(differences.mean(), abs=0.05 * deviation)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.05)


def test_a_higher_level_is_wider_and_many_clients_fit_into_memory() -> None:
    differences = np.random.default_rng(2).normal(size=(100_000, 2))
    narrow, wide = bootstrap_interval(differences, resamples=100, level=0.5), bootstrap_interval(differences, resamples=100)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8), st.floats(-3, 3))
def test_the_interval_moves_with_the_differences_and_is_the_same_again(values: list[float], by: float) -> None:
    differences = np.array(values)[:, None]
    low, high = bootstrap_interval(differences, resamples=200)
    assert (low, high) == bootstrap_interval(differences, resamples=200)
    assert bootstrap_interval(differences + by, resamples=200) == pytest.approx((low + by, high + by), abs=1e-12)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
