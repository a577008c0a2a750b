"""Averages that a few wild adapters cannot drag away, against Python's own."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmira.adapters import Adapter, median_of, trimmed_mean

numbers = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9)


def adapters(values: list[float]) -> list[Adapter]:
    return [{"m": torch.tensor([[value, -value]])} for value in values]


@given(numbers)
def test_the_median_is_that_of_each_entry(values: list[float]) -> None:
    found = median_of(adapters(values))["m"]
    expected = statistics.median(values)
    torch.testing.assert_close(found, torch.tensor([[expected, -expected]]), rtol=1e-6, atol=1e-6)


@given(numbers, st.sampled_from([0.1, 0.2, 0.3, 0.49]))
def test_a_trimmed_mean_leaves_out_a_share_at_either_end(values: list[float], share: float) -> None:
    cut = min(math.ceil(share * len(values) - 1e-9), (len(values) - 1) // 2)
    inside = sorted(values)[cut : len(values) - cut]
    found = trimmed_mean(adapters(values), share)["m"][0, 0]
    assert float(found) == pytest.approx(statistics.fmean(inside), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("wild", [1e30, -1e30])
def test_one_wild_adapter_of_five_moves_neither_out_of_the_others_range(wild: float) -> None:
    values = [1.0, 2.0, 3.0, 4.0, wild]
    for found in (median_of(adapters(values)), trimmed_mean(adapters(values), 0.2)):
        assert 1 <= float(found["m"][0, 0]) <= 4


def test_they_keep_the_number_type() -> None:
    halves = [{"m": torch.tensor([1.0, 2.0], dtype=torch.float16)}] * 3
    assert median_of(halves)["m"].dtype == torch.float16
