"""The rule by which a client takes its own adapter or another."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from fedmira.metrics.gate import CONFIDENCE, FEWEST_ROWS, Standing, judge


def test_a_clear_gain_is_taken() -> None:
    own, other = [2.0, 4.0, 2.0, 4.0, 2.0], [1.5, 3.1, 1.5, 3.0, 1.4]
    found = judge({"local": own, "together": other}, [1, 2, 1, 2, 1], "local")
    assert found.choice == found.best_other == "together" and found.standing is Standing.better
    assert found.own_loss == pytest.approx(14 / 7)
    assert found.difference == pytest.approx(sum(other) / 7 - 2)


def test_difference_and_margin_are_those_of_the_ratio_estimator() -> None:
    """By hand, with one other adapter, so that all folds choose it."""
    tokens = np.array([3, 1, 4, 1, 5, 9])
    own, other = np.array([3.0, 1, 4, 1, 5, 9]), np.array([2.5, 1.2, 3.9, 0.7, 4.0, 8.8])
    d = other - own
    mean = d.sum() / tokens.sum()
    error = math.sqrt(6 / 5 * ((d - mean * tokens) ** 2).sum()) / tokens.sum()
    found = judge({"own": own.tolist(), "x": other.tolist()}, tokens.tolist(), "own")
    assert found.difference == pytest.approx(mean)
    assert found.margin == pytest.approx(student.ppf(CONFIDENCE, 5) * error)


def test_a_choice_among_several_widens_the_margin() -> None:
    """By sqrt(1 + 5 / 4) = 1.5 with five folds: here both others are the same."""
    own, other = [2.0, 2.1, 1.9, 2.2, 2.0, 2.4], [1.8, 2.0, 1.9, 2.0, 1.7, 2.3]
    one = judge({"own": own, "x": other}, [1] * 6, "own")
    two = judge({"own": own, "x": other, "y": other}, [1] * 6, "own")
    assert one.margin and two.margin == pytest.approx(1.5 * one.margin)
    assert two.difference == one.difference


def test_rows_judge_only_what_other_rows_chose() -> None:
    """Each of five adapters is good on one row alone: the best in sample, bad out of sample."""
    losses = {"own": [1.0] * 5} | {
        f"lucky-{row}": [0.0 if row == place else 1.2 for place in range(5)] for row in range(5)
    }
    found = judge(losses, [1] * 5, "own")
    best = min(sum(values) for name, values in losses.items() if name != "own")
    assert best < sum(losses["own"]), "in sample the best of the others is ahead"
    assert found.choice == "own" and found.difference == pytest.approx(0.2)
    assert found.standing is Standing.no_better


@pytest.mark.parametrize("rows", range(FEWEST_ROWS))
def test_few_rows_judge_nothing_and_say_so(rows: int) -> None:
    found = judge({"own": [9.0] * rows, "x": [1.0] * rows}, [1] * rows, "own")
    assert (found.choice, found.standing) == ("own", Standing.unclear)
    assert found.difference is None and str(rows) in found.reason
    assert (found.own_loss is None) == (rows == 0)


def test_the_margin_grows_as_rows_shrink() -> None:
    own, other = [2.0, 2.0] * 20, [1.7, 2.1] * 20
    margins = [
        judge({"own": own[:rows], "x": other[:rows]}, [1] * rows, "own").margin
        for rows in (40, 20, 10, 4)
    ]
    assert margins == sorted(margins) and margins[0] > 0  # type: ignore[type-var,operator]


def test_losses_that_are_not_finite() -> None:
    bad = [math.nan] + [0.1] * 5
    assert judge({"own": [1.0] * 6, "x": bad}, [1] * 6, "own").choice == "own"
    found = judge({"own": bad, "x": [1.0] * 6}, [1] * 6, "own")
    assert found.choice == "x" and "not finite" in found.reason
    found = judge({"own": [math.inf] * 6, "x": bad}, [1] * 6, "own")
    assert found.choice == "own" and "finite" in found.reason


def test_an_adapter_equal_to_the_own_is_not_taken() -> None:
    own = [1.0, 2.0, 3.0, 4.0, 5.0]
    found = judge({"own": own, "x": own}, [1] * 5, "own")
    assert (found.choice, found.difference, found.margin) == ("own", 0.0, 0.0)


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ValueError, match="own adapter 'z' is not among own"):
        judge({"own": [1.0]}, [1], "z")
    with pytest.raises(ValueError, match="'x' has losses of 1 rows, and there are 2"):
        judge({"own": [1.0, 1.0], "x": [1.0]}, [1, 1], "own")
    with pytest.raises(ValueError, match="0 response tokens"):
        judge({"own": [1.0]}, [0], "own")
    with pytest.raises(ValueError, match=r"confidence is 0\.4"):
        judge({"own": [1.0]}, [1], "own", confidence=0.4)


def test_adapters_that_do_not_help_are_seldom_taken() -> None:
    """400 clients of 12 rows and two others that differ by noise: at most the promised share.

    The share of clients that take another one is binomial with at most 1 - CONFIDENCE; choosing by
    the lowest mean would take one for two of three clients.
    """
    draws = np.random.default_rng(0)
    taken = 0
    for _ in range(400):
        own = draws.normal(2, 0.5, 12)
        others = {name: (own + draws.normal(0, 0.2, 12)).tolist() for name in "ab"}
        taken += judge({"own": own.tolist(), **others}, [1] * 12, "own").choice != "own"
    expected, error = 400 * (1 - CONFIDENCE), math.sqrt(400 * CONFIDENCE * (1 - CONFIDENCE))
    assert taken < expected + 2 * error


@given(
    st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9), st.integers(1, 9)), min_size=4),
    st.floats(0.1, 10),
)
@settings(max_examples=50, deadline=None)
def test_the_unit_of_losses_does_not_matter(
    rows: list[tuple[float, float, int]], unit: float
) -> None:
    own, other, tokens = (list(column) for column in zip(*rows, strict=True))
    found = judge({"own": own, "x": other}, tokens, "own")
    scaled = judge(
        {"own": [unit * value for value in own], "x": [unit * value for value in other]},
        tokens,
        "own",
    )
    assert scaled.difference == pytest.approx(unit * (found.difference or 0.0), abs=1e-9)
    assert scaled.margin == pytest.approx(unit * (found.margin or 0.0), abs=1e-6)
