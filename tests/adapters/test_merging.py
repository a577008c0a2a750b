"""Merging and compressing are exact on products, whatever the factors, ranks and layers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmira.adapters import (
    folded,
    metagpt_weights,
    nearest,
    padded,
    rank_by_energy,
    singular_values,
    spare_directions,
    ties,
    update_gram,
)
from fedmira.errors import RunError

SIZES = {"q": (7, 5), "v": (6, 9)}
"""Layer -> outputs and inputs."""


def draw(seed: int, rank: int = 3, layers: tuple[str, ...] = ("q", "v")) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    update = {}
    for layer in layers:
        outputs, inputs = SIZES[layer]
        update[f"{layer}.lora_A.weight"] = torch.randn(
            rank, inputs, generator=generator, dtype=torch.float64
        )
        update[f"{layer}.lora_B.weight"] = torch.randn(
            outputs, rank, generator=generator, dtype=torch.float64
        )
    return update


def product(update: dict[str, Tensor], layer: str) -> Tensor:
    if f"{layer}.lora_A.weight" not in update:
        return torch.zeros(*SIZES[layer], dtype=torch.float64)
    return (update[f"{layer}.lora_B.weight"] @ update[f"{layer}.lora_A.weight"]).double()


def of_norm(norm: float, place: int = 0) -> dict[str, Tensor]:
    """One entry of the product of layer q at (place, place), and nothing else."""
    down, up = torch.zeros(1, 5), torch.zeros(7, 1)
    down[0, place], up[place, 0] = 1, norm
    return {"q.lora_A.weight": down, "q.lora_B.weight": up}


def merged(
    updates: list[dict[str, Tensor]], weights: list[float], rank: int
) -> tuple[dict[str, Tensor], float]:
    ranks, scales = dict.fromkeys(SIZES, rank), {"q": 2.0, "v": 0.5}
    mixed = nearest(updates, weights, ranks, scales, spare_directions(updates, ranks))
    return folded(mixed.adapter, scales), mixed.tail


@pytest.mark.parametrize(
    ("norms", "weights"),
    [
        ((1, 2), (0.2, 0.8)),  # 1 / 5 and 4 / 5
        ((3, 1), (0.9, 0.1)),  # of two equals one scaled by 3: 9 / 10
        ((1, 1, 1, 1), (0.25,) * 4),
        ((2, 0), (1.0, 0.0)),
    ],
)
def test_metagpt_weighs_by_squared_norms(norms: tuple, weights: tuple) -> None:
    assert metagpt_weights([of_norm(norm) for norm in norms]) == pytest.approx(list(weights))


def test_metagpt_refuses_adapters_that_are_all_zero() -> None:
    with pytest.raises(RunError, match="all 2 adapters are zero"):
        metagpt_weights([of_norm(0), of_norm(0)])


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_metagpt_minimises_its_objective(seed: int) -> None:
    """sum_k |tau_k|^2 |theta - tau_k|^2 rises whichever way theta leaves the merge."""
    updates = [draw(seed + k, rank=2) for k in range(3)]
    weights = metagpt_weights(updates)

    def objective(theta: dict[str, Tensor]) -> float:
        return sum(
            sum(float(product(tau, n).square().sum()) for n in SIZES)
            * sum(float((theta[n] - product(tau, n)).square().sum()) for n in SIZES)
            for tau in updates
        )

    best = {
        n: sum(w * product(tau, n) for w, tau in zip(weights, updates, strict=True)) for n in SIZES
    }
    generator = torch.Generator().manual_seed(seed)
    for _ in range(4):
        aside = {
            n: best[n] + 1e-3 * torch.randn(*SIZES[n], generator=generator).double() for n in SIZES
        }
        assert objective(aside) > objective(best)


def test_two_orthogonal_equal_adapters_merge_to_norm_of_half_root_two() -> None:
    update, tail = merged([of_norm(1, 0), of_norm(1, 1)], [0.5, 0.5], 2)
    assert float(update_gram([update])) ** 0.5 == pytest.approx(1 / math.sqrt(2))
    assert tail == pytest.approx(0, abs=1e-7)


@given(st.integers(0, 10**6), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_the_cut_of_a_merge_is_the_nearest_and_its_tail_the_rest(seed: int, rank: int) -> None:
    updates = [draw(seed), draw(seed + 1, 2), draw(seed + 2, 4, ("v",))]
    weights = [0.5, 0.3, 0.2]
    update, tail = merged(updates, weights, rank)
    squared = 0.0
    for layer in SIZES:
        whole = sum(
            weight * product(tau, layer) for weight, tau in zip(weights, updates, strict=True)
        )
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
        expected = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert torch.allclose(product(update, layer), expected, atol=1e-5)
        squared += float(values[rank:].square().sum())
    assert tail == pytest.approx(math.sqrt(squared), abs=1e-6)


def test_layers_that_one_lacks_are_zero_there() -> None:
    both, alone = draw(0), draw(1, 3, ("q",))
    gram = update_gram([both, alone])
    assert float(gram[0, 1]) == pytest.approx(
        float((product(both, "q") * product(alone, "q")).sum())
    )
    assert [sorted(update) for update in padded([both, alone])] == [sorted(both)] * 2


def test_layers_of_other_sizes_are_of_other_bases() -> None:
    strange = {"q.lora_A.weight": torch.ones(1, 4), "q.lora_B.weight": torch.ones(7, 1)}
    with pytest.raises(RunError, match="'q' is 4 x 7 in one and 5 x 7 in another"):
        padded([draw(0), strange])


def by_hand(products: list[Tensor], keep: float) -> Tensor:
    """TIES on flat vectors [K, N], entry by entry."""
    trimmed = []
    for tau in products:
        count = max(1, math.ceil(keep * len(tau)))
        limit = sorted((abs(float(x)) for x in tau), reverse=True)[count - 1]
        trimmed.append([float(x) if abs(float(x)) >= limit else 0.0 for x in tau])
    result = []
    for entries in zip(*trimmed, strict=True):
        elected = sum(entries)
        agreeing = [x for x in entries if x * elected > 0]
        result.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(result, dtype=torch.float64)


@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.2, 0.5, 1.0]))
@settings(max_examples=20, deadline=None)
def test_ties_trims_over_all_layers_elects_and_takes_the_disjoint_mean(
    seed: int, keep: float
) -> None:
    updates = [draw(seed), draw(seed + 1, 2), draw(seed + 2, 4, ("v",))]
    ranks = {"q": 5, "v": 6}  # nothing is cut
    scales = {"q": 3.0, "v": 0.5}
    mixed = ties(updates, keep, ranks, scales, spare_directions(updates, ranks))
    found = folded(mixed.adapter, scales)
    flat = [
        torch.cat([product(tau, n).float().flatten() for n in sorted(SIZES)]) for tau in updates
    ]
    expected = by_hand(flat, keep)
    assert torch.allclose(
        torch.cat([product(found, n).flatten() for n in sorted(SIZES)]), expected, atol=1e-5
    )
    assert mixed.tail == pytest.approx(0, abs=1e-5)


def test_ties_does_not_ask_how_products_are_factored() -> None:
    update = draw(4)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    other = {
        name: turn @ part if "lora_A" in name else part @ turn.T for name, part in update.items()
    }
    ranks, scales = {"q": 5, "v": 6}, dict.fromkeys(SIZES, 1.0)
    spare = spare_directions([update], ranks)
    one, two = (
        ties([each, draw(5)], 0.3, ranks, scales, spare).adapter for each in (update, other)
    )
    for layer in SIZES:
        assert torch.allclose(product(one, layer), product(two, layer), atol=1e-5)


@given(st.integers(0, 10**6), st.floats(0.05, 1.0))
@settings(max_examples=25, deadline=None)
def test_the_rank_by_energy_is_the_smallest_that_keeps_enough(seed: int, energy: float) -> None:
    update = draw(seed, 4)
    values = singular_values(update)
    for layer in SIZES:
        dense = torch.linalg.svdvals(product(update, layer))[:4]
        assert torch.allclose(values[layer], dense, atol=1e-9)
    rank = rank_by_energy(values, energy)
    squares = sum(of.square() for of in values.values())
    kept = [float(squares[:q].sum() / squares.sum()) for q in range(5)]
    assert kept[rank] >= energy - 1e-12
    assert rank == 1 or kept[rank - 1] < energy + 1e-12


def test_an_update_of_zero_has_rank_zero() -> None:
    assert rank_by_energy(singular_values(of_norm(0)), 0.9) == 0
