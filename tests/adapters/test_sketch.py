"""Sketches are linear, indifferent to the factorisation, and as exact as they say.

Inner products lie within the error that they state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmira.adapters import (
    cross_gram,
    dot_products,
    factor_sketches,
    gram,
    product_sketches,
)

SEEDS = 400
ENTRIES = 64


def lora(rank: int, seed: int, module_count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        f"m.{number}.lora_{part}.weight": shape
        for number in range(module_count)
        for part, shape in (("A", (rank, 9)), ("B", (7, rank)))
    }
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def joined(adapters: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The adapter of larger rank whose update is the weighted sum of updates."""
    result = {}
    for name in adapters[0]:
        parts = [
            adapter[name] * (weight if ".lora_B." in name else 1)
            for adapter, weight in zip(adapters, weights, strict=True)
        ]
        result[name] = torch.cat(parts, dim=1 if ".lora_B." in name else 0)
    return result


def test_an_entry_of_the_update_goes_to_one_place_with_a_sign() -> None:
    """B and A with a single 1 each make an update with a single 1.

    One entry of the sketch is +1 or -1.
    """
    adapter = {
        name: torch.zeros_like(tensor) for name, tensor in lora(2, 0, module_count=1).items()
    }
    adapter["m.0.lora_A.weight"][1, 4] = 1
    adapter["m.0.lora_B.weight"][6, 1] = 1
    sketch = product_sketches([adapter], [1.0], 32)
    assert sketch.abs().sort().values[0, -2:].tolist() == pytest.approx([0, 1], abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**20), entries=st.integers(1, 70))
def test_product_sketches_are_linear_in_the_update_and_know_no_factors(
    seed: int, entries: int
) -> None:
    """S(2 x - 3 y) = 2 S(x) - 3 S(y), with x and y of different ranks.

    And B G, G^-1 A is the same update as B, A.
    """
    one, other = lora(2, seed), lora(3, seed + 1)
    sketches = product_sketches(
        [one, other, joined([one, other], [2.0, -3.0])], [1.0, 1.0, 1.0], entries
    )
    torch.testing.assert_close(sketches[2], 2 * sketches[0] - 3 * sketches[1], rtol=1e-4, atol=1e-4)
    turn = torch.eye(2) + 0.5 * torch.ones(2, 2).tril(-1)
    turned = {
        name: torch.linalg.solve(turn, tensor) if ".lora_A." in name else tensor @ turn
        for name, tensor in one.items()
    }
    torch.testing.assert_close(
        product_sketches([turned], [1.0], entries)[0], sketches[0], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        product_sketches([one], [2.5], entries)[0], 2.5 * sketches[0], rtol=1e-4, atol=1e-4
    )


def test_a_sketch_does_not_depend_on_whom_it_is_computed_with() -> None:
    adapters = [lora(2 + k % 2, k) for k in range(5)]
    together = product_sketches(adapters, [1.0] * 5, ENTRIES)
    for k, adapter in enumerate(adapters):
        torch.testing.assert_close(
            product_sketches([adapter], [1.0], ENTRIES)[0], together[k], rtol=1e-5, atol=1e-5
        )


def test_zero_updates_have_zero_sketches() -> None:
    idle = {
        name: torch.zeros_like(tensor) if ".lora_B." in name else tensor
        for name, tensor in lora(2, 0).items()
    }
    assert not bool(product_sketches([idle, lora(2, 1)], [1.0, 1.0], ENTRIES)[0].any())
    assert (
        product_sketches([], [], ENTRIES).shape
        == factor_sketches([], ENTRIES).shape
        == (0, ENTRIES)
    )


def test_factor_sketches_are_linear_in_the_factors() -> None:
    one, other = lora(2, 0), lora(2, 1)
    combination = {name: 2 * one[name] - 3 * other[name] for name in one}
    sketches = factor_sketches([one, other, combination], ENTRIES)
    torch.testing.assert_close(sketches[2], 2 * sketches[0] - 3 * sketches[1], rtol=1e-4, atol=1e-4)


def rank_one(seed: int) -> list[dict[str, Tensor]]:
    """One module of rank one with flat factors: the worst case of the bound.

    Two updates with cosine 0.6 * 0.6.
    """
    generator = torch.Generator().manual_seed(seed)

    def factor(length: int, differing: int) -> tuple[Tensor, Tensor]:
        first = torch.randint(2, (length,), generator=generator).float() * 2 - 1
        second = first.clone()
        second[:differing] *= -1
        return first, second

    (up, other_up), (down, other_down) = factor(30, 6), factor(40, 8)
    return [
        {"m.lora_A.weight": a[None], "m.lora_B.weight": b[:, None]}
        for a, b in ((down, up), (other_down, other_up))
    ]


def spread(seed: int) -> list[dict[str, Tensor]]:
    """Six modules of rank 5; the second update is near the first."""
    one, noise = (lora(5, seed + k, module_count=6) for k in range(2))
    return [
        one,
        {
            name: tensor if ".lora_A." in name else tensor + noise[name]
            for name, tensor in one.items()
        },
    ]


def cosine(products: Tensor) -> Tensor:
    return products[..., 0, 1] / (products[..., 0, 0] * products[..., 1, 1]).sqrt()


CASES = {"rank one": rank_one(1), "many modules": spread(1)}


@cache
def estimates(case: str) -> Tensor:
    """Inner products of the sketches of the two updates under 400 maps, [400, 2, 2]."""
    sketches = torch.stack(
        [product_sketches(CASES[case], [1.0, 1.0], ENTRIES, seed) for seed in range(SEEDS)]
    ).double()
    return sketches @ sketches.mT


@pytest.mark.parametrize("case", CASES)
def test_inner_products_of_product_sketches_are_unbiased_within_the_stated_error(case: str) -> None:
    """Means over 400 maps lie within 4 standard errors of the truth.

    The root mean square error is within its bound, 15 % for chance.
    """
    exact = gram(CASES[case], [1.0, 1.0])
    lengths = exact.diagonal().sqrt()
    errors = (estimates(case) - exact) / (lengths[:, None] * lengths[None, :])
    bound = math.sqrt(8 / ENTRIES)
    assert float(errors.mean(dim=0).abs().max()) < 4 * bound / math.sqrt(SEEDS)
    rms = errors.square().mean(dim=0).sqrt()
    assert float(rms.max()) < 1.15 * bound
    if case == "rank one":
        assert float(rms.max()) > 0.7 * bound
    else:
        assert float(rms[0, 1]) == pytest.approx(
            math.sqrt((1 + float(cosine(exact)) ** 2) / ENTRIES), rel=0.2
        )


@pytest.mark.parametrize("case", CASES)
def test_cosines_between_sketches_are_within_the_stated_error(case: str) -> None:
    c = cosine(gram(CASES[case], [1.0, 1.0]))
    rms = float((cosine(estimates(case)) - c).square().mean().sqrt())
    assert rms < 1.14 * math.sqrt(8 / ENTRIES)
    if case == "many modules":
        assert rms == pytest.approx((1 - float(c) ** 2) / math.sqrt(ENTRIES), rel=0.3)


def test_inner_products_of_factor_sketches_are_unbiased_within_the_stated_error() -> None:
    adapters = spread(3)
    exact = dot_products(adapters, adapters)
    lengths = exact.diagonal().sqrt()
    sketches = torch.stack(
        [factor_sketches(adapters, ENTRIES, seed) for seed in range(SEEDS)]
    ).double()
    errors = (sketches @ sketches.mT - exact) / (lengths[:, None] * lengths[None, :])
    c = float(cosine(exact))
    assert float(errors.mean(dim=0).abs().max()) < 4 * math.sqrt(2 / ENTRIES / SEEDS)
    assert float(errors[:, 0, 1].square().mean().sqrt()) == pytest.approx(
        math.sqrt((1 + c**2) / ENTRIES), rel=0.15
    )


@pytest.mark.parametrize(
    "sketched",
    [
        product_sketches,
        lambda adapters, scales, entries, seed: factor_sketches(adapters, entries, seed),
    ],
)
def test_sketches_depend_on_nothing_but_adapter_size_and_seed(
    sketched: Callable[..., Tensor],
) -> None:
    adapters = [lora(2, 0)]
    first = sketched(adapters, [1.0], ENTRIES, 3)
    torch.manual_seed(99)
    assert torch.equal(first, sketched([dict(reversed(adapters[0].items()))], [1.0], ENTRIES, 3))
    assert not torch.equal(first, sketched(adapters, [1.0], ENTRIES, 4))


def test_the_estimate_gets_better_with_more_entries() -> None:
    adapters = [lora(4, seed, module_count=6) for seed in range(20)]
    exact = cross_gram(adapters, [1.0] * 20, adapters, [1.0] * 20)
    errors = []
    for entries in (64, 1024):
        sketches = product_sketches(adapters, [1.0] * 20, entries).double()
        errors.append(float((sketches @ sketches.T - exact).norm() / exact.diagonal().mean() / 20))
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.3)
