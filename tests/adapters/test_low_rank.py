"""The low-rank algebra against dense float64 matrices."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmira.adapters import (
    Adapter,
    cross_gram,
    digest,
    dot_products,
    gram,
    inner,
    mix,
    modules,
    norm,
    product_norm,
    same_shapes,
    scale,
    sum_norm,
    truncate_rank,
)
from fedmira.errors import RunError

PREFIX = "base_model.model.layers.0."
SHAPES = {"q_proj": (24, 20), "v_proj": (12, 20)}


def lora(rank: int, seed: int, shapes: dict[str, tuple[int, int]] = SHAPES) -> dict[str, Tensor]:
    """Random factors for modules of the given (out, in) shapes."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, (out, into) in shapes.items():
        adapter[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, into, generator=generator)
        adapter[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    return adapter


def dense(adapter: Adapter, scale: float = 1.0) -> dict[str, Tensor]:
    """The full matrices s B A in float64."""
    return {
        name: scale * up.double() @ down.double() for name, (down, up) in modules(adapter).items()
    }


def dense_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    matrices = [dense(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True)]
    return {name: torch.stack([matrix[name] for matrix in matrices]).sum(0) for name in matrices[0]}


def best_of_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrix of that rank by a full decomposition, and the singular values left out."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank], values[rank:]


def test_modules_are_named_without_the_factor() -> None:
    found = modules(lora(4, 0))
    assert list(found) == [PREFIX + "q_proj", PREFIX + "v_proj"]
    assert found[PREFIX + "v_proj"][0].shape == (4, 20)
    assert found[PREFIX + "v_proj"][1].shape == (12, 4)


def test_tensors_that_are_not_lora_fail_the_run_with_everything_that_is_wrong() -> None:
    adapter = lora(4, 0)
    del adapter[PREFIX + "q_proj.lora_B.weight"]
    adapter[PREFIX + "v_proj.lora_A.weight"] = torch.zeros(3, 20)
    with pytest.raises(RunError) as caught:
        modules({**adapter, "prompt_encoder.weight": torch.zeros(2)})
    problems = str(caught.value).split("\n")
    assert len(problems) == 3
    assert "prompt_encoder.weight" in problems[0]
    assert "q_proj" in problems[1]
    assert "(3, 20)" in problems[2]


def test_gram_equals_dense_inner_products_for_clients_of_different_ranks() -> None:
    adapters = [lora(rank, seed) for seed, rank in enumerate((4, 8, 16, 8))]
    scales = [scale(16, rank) for rank in (4, 8, 16, 8)]
    flat = torch.stack(
        [
            torch.cat([matrix.flatten() for matrix in dense(a, s).values()])
            for a, s in zip(adapters, scales, strict=True)
        ]
    )
    expected = flat @ flat.T
    torch.testing.assert_close(gram(adapters, scales), expected, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(
        cross_gram(adapters[:2], scales[:2], adapters[1:], scales[1:]),
        expected[:2, 1:],
        rtol=1e-12,
        atol=1e-9,
    )
    assert inner(adapters[0], adapters[2], scales[0], scales[2]) == pytest.approx(
        float(expected[0, 2]), rel=1e-10
    )
    assert product_norm(adapters[2], scales[2]) == pytest.approx(
        float(expected[2, 2]) ** 0.5, rel=1e-12
    )


def test_gram_in_blocks_of_rows_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, scales = [lora(4, seed) for seed in range(7)], [1.0] * 7
    whole = gram(adapters, scales)
    monkeypatch.setattr("fedmira.adapters.low_rank.BLOCK_ENTRIES", 4 * 28 * 2)
    torch.testing.assert_close(gram(adapters, scales), whole, rtol=1e-13, atol=1e-12)


def test_gram_of_nobody_is_empty() -> None:
    assert gram([], []).shape == (0, 0)
    assert cross_gram([], [], [lora(4, 0)], [1.0]).shape == (0, 1)


def test_dot_products_are_squared_norms_on_the_diagonal() -> None:
    adapters = [lora(4, seed) for seed in range(3)]
    products = dot_products(adapters, adapters)
    assert float(products[1, 1]) == pytest.approx(norm(adapters[1]) ** 2, rel=1e-12)
    torch.testing.assert_close(products, products.T)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**20), rank=st.integers(1, 6))
def test_product_cosine_does_not_depend_on_the_factorisation(seed: int, rank: int) -> None:
    """(B G)(G^-1 A) = B A, so inner products and norms stay.

    G = I + strictly lower triangle is always invertible.
    """
    left, right = lora(rank, seed), lora(rank, seed + 1)
    turn = (
        torch.eye(rank)
        + torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed)).tril(-1) * 0.3
    )
    turned = {
        name: torch.linalg.solve(turn.double(), tensor.double()).float()
        if ".lora_A." in name
        else tensor @ turn
        for name, tensor in left.items()
    }
    size = product_norm(left) * product_norm(right)
    assert inner(turned, right) == pytest.approx(inner(left, right), abs=1e-5 * size)
    assert product_norm(turned) == pytest.approx(product_norm(left), rel=1e-4)


@pytest.mark.parametrize("rank", [4, 8, 16])
@pytest.mark.parametrize("shape", [(96, 80), (24, 20)], ids=["thin stack: QR", "wide stack: dense"])
def test_mix_is_the_best_adapter_of_the_receivers_rank(rank: int, shape: tuple[int, int]) -> None:
    """Eckart-Young: the product equals the dense sum cut to the rank.

    The tail is the norm of what was cut.
    """
    ranks = (4, 8, 16)
    adapters = [
        lora(r, seed, {"q": shape, "v": (shape[0] // 2, shape[1])}) for seed, r in enumerate(ranks)
    ]
    scales = [scale(16, r) for r in ranks]
    weights = [0.5, 0.2, 0.3]
    receiver = adapters[ranks.index(rank)]
    mixed = mix(adapters, weights, scales, rank, scale(16, rank), receiver)
    assert same_shapes(mixed.adapter, receiver)
    assert list(mixed.adapter) == list(receiver)
    expected = dense_sum(adapters, [w * s for w, s in zip(weights, scales, strict=True)])
    squared_tail = 0.0
    for name, matrix in dense(mixed.adapter, scale(16, rank)).items():
        best, lost = best_of_rank(expected[name], rank)
        torch.testing.assert_close(matrix, best, rtol=1e-5, atol=1e-5 * float(best.abs().max()))
        squared_tail += float(lost.square().sum())
    assert mixed.tail == pytest.approx(squared_tail**0.5, rel=1e-9)
    assert mixed.tail > 0


@pytest.mark.parametrize("shape", [(60, 50), (50, 60)], ids=["tall", "wide"])
def test_singular_values_far_below_the_largest_keep_their_directions(
    shape: tuple[int, int],
) -> None:
    """The square of 1e-5 of the largest value is at the rounding of the square of the largest."""
    out, into = shape
    generator = torch.Generator().manual_seed(3)
    left, _ = torch.linalg.qr(torch.randn(out, 4, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(into, 4, generator=generator, dtype=torch.float64))
    values = torch.tensor([1.0, 1e-2, 1e-4, 1e-5], dtype=torch.float64)
    many = 60  # parts that sum to the matrix, so that the stack is not small
    parts = [
        {
            "q.lora_A.weight": right.T.float(),
            "q.lora_B.weight": (left * values).float() / many,
        }
        for _ in range(many)
    ]
    mixed = mix(parts, [1.0] * many, [1.0] * many, 4, 1.0, parts[0])
    found = torch.linalg.svdvals(dense(mixed.adapter)["q"])[:4]
    torch.testing.assert_close(found, values, rtol=1e-2, atol=0.0)
    assert mixed.tail < 1e-6


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=8),
)
def test_norm_of_a_sum_is_that_of_the_dense_sum(seed: int, ranks: list[int]) -> None:
    """Of few directions (1) and of more than a matrix has (up to 72 of 12), whatever the signs."""
    adapters = [lora(rank, seed + i) for i, rank in enumerate(ranks)]
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(ranks), generator=generator).tolist()
    scales = [scale(16, rank) for rank in ranks]
    summed = dense_sum(adapters, [w * s for w, s in zip(weights, scales, strict=True)])
    expected = sum(float(matrix.square().sum()) for matrix in summed.values()) ** 0.5
    assert sum_norm(adapters, weights, scales) == pytest.approx(expected, rel=1e-6)


def test_norm_of_no_sum_is_zero() -> None:
    assert sum_norm([], [], []) == 0.0


def test_same_update_at_two_ranks_stays_the_same_update() -> None:
    """Each product carries its own alpha / r.

    A rank-4 client sent to rank 16 keeps its matrix, though 16/4 is not 16/16.
    """
    small, large = lora(4, 0), lora(16, 1)
    mixed = mix([small, large], [1.0, 0.0], [scale(16, 4), scale(16, 16)], 16, scale(16, 16), large)
    for name, matrix in dense(mixed.adapter, 1.0).items():
        torch.testing.assert_close(matrix, dense(small, 4.0)[name], rtol=1e-5, atol=1e-4)
    assert mixed.tail < 1e-4


def test_balanced_and_flex_are_the_same_matrix_split_in_two_ways() -> None:
    adapters = [lora(4, 0), lora(4, 1)]
    balanced, flex = (
        mix(adapters, [0.5, 0.5], [2.0, 2.0], 4, 2.0, adapters[0], split)
        for split in ("balanced", "flex")
    )
    for name, matrix in dense(flex.adapter).items():
        torch.testing.assert_close(matrix, dense(balanced.adapter)[name], rtol=1e-5, atol=1e-5)
    for down, up in modules(flex.adapter).values():
        torch.testing.assert_close(down @ down.T, torch.eye(4), rtol=1e-5, atol=1e-5)
        assert bool((up.norm(dim=0).diff() < 0).all())
    for down, up in modules(balanced.adapter).values():
        torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0), rtol=1e-5, atol=1e-5)


def test_signs_are_fixed_by_the_largest_entry_of_each_left_vector() -> None:
    mixed = mix([lora(4, 0), lora(4, 1)], [0.5, 0.5], [1.0, 1.0], 4, 1.0, lora(4, 0))
    for _, up in modules(mixed.adapter).values():
        assert bool((up.gather(0, up.abs().argmax(dim=0, keepdim=True)) > 0).all())


def test_missing_directions_keep_the_receivers_rows_of_a_and_zero_columns_of_b() -> None:
    """A rank-2 sum at rank 6: two directions carry it, four are as in a fresh LoRA."""
    small, receiver = lora(2, 0), lora(6, 1)
    mixed = mix([small, receiver], [1.0, 0.0], [1.0, 1.0], 6, 1.0, receiver)
    for name, (down, up) in modules(mixed.adapter).items():
        assert torch.equal(down[2:], modules(receiver)[name][0][2:])
        assert not bool(up[:, 2:].any())
        torch.testing.assert_close(
            up.double() @ down.double(), dense(small)[name], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("weights", [[0.0, 0.0], [0.5, 0.5]], ids=["no weight", "no update"])
def test_zero_mixture_keeps_the_receivers_a(weights: list[float]) -> None:
    zero = {
        name: torch.zeros_like(tensor) if ".lora_B." in name else tensor
        for name, tensor in lora(4, 0).items()
    }
    mixed = mix([zero, zero], weights, [1.0, 1.0], 4, 1.0, zero)
    assert digest(mixed.adapter) == digest(zero)
    assert mixed.tail == 0


def test_mix_changes_none_of_its_inputs() -> None:
    adapters = [lora(4, 0), lora(4, 1)]
    before = [digest(adapter) for adapter in adapters]
    mix(adapters, [0.5, 0.5], [1.0, 1.0], 4, 1.0, adapters[0])
    assert [digest(adapter) for adapter in adapters] == before


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**20), count=st.integers(2, 5))
def test_averaging_factors_misses_half_the_weighted_covariance_of_the_factors(
    seed: int, count: int
) -> None:
    """Sum p B A - (sum p B)(sum p A) = 1/2 sum_kl p_k p_l (B_k - B_l)(A_k - A_l)."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, generator=generator, dtype=torch.float64) + 0.1
    weights /= weights.sum()
    pairs = [modules(lora(3, seed + k))[PREFIX + "q_proj"] for k in range(count)]
    down, up = (torch.stack([pair[i].double() for pair in pairs]) for i in (0, 1))
    exact = sum(
        (weights[k] * up[k] @ down[k] for k in range(count)),
        torch.zeros(24, 20, dtype=torch.float64),
    )
    averaged = torch.einsum("k,kij->ij", weights, up) @ torch.einsum("k,kij->ij", weights, down)
    half = sum(
        (
            0.5 * weights[k] * weights[j] * (up[k] - up[j]) @ (down[k] - down[j])
            for k in range(count)
            for j in range(count)
        ),
        torch.zeros(24, 20, dtype=torch.float64),
    )
    torch.testing.assert_close(exact - averaged, half, rtol=1e-10, atol=1e-10)


def test_truncating_keeps_the_first_rows_and_columns() -> None:
    cut = truncate_rank(lora(8, 0), 3)
    for name, (down, up) in modules(cut).items():
        assert torch.equal(down, modules(lora(8, 0))[name][0][:3])
        assert torch.equal(up, modules(lora(8, 0))[name][1][:, :3])
        assert up.is_contiguous()


def test_truncating_to_a_larger_rank_fails_the_run_and_names_both() -> None:
    with pytest.raises(RunError, match=r"has rank 4; cannot be cut to 8"):
        truncate_rank(lora(4, 0), 8)
