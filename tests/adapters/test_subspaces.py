"""Where updates point to: column spaces against principal angles of dense updates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from torch import Tensor

from fedmira.adapters import (
    column_spaces,
    gram,
    modules,
    product_sketches,
)
from lora_federation import dense, lora, start


def likeness(left: Tensor, right: Tensor) -> float:
    """sum_i cos^2 of the principal angles between two column spaces, over sqrt(q q').

    The spaces are those of dense matrices.
    """
    left_size, right_size = (int(torch.linalg.matrix_rank(matrix)) for matrix in (left, right))
    left_basis, right_basis = (
        torch.linalg.svd(matrix).U[:, :size].numpy()
        for matrix, size in ((left, left_size), (right, right_size))
    )
    return float(np.square(np.cos(subspace_angles(left_basis, right_basis))).sum()) / math.sqrt(
        left_size * right_size
    )


def test_inner_products_are_the_squared_cosines_of_the_principal_angles_over_all_modules() -> None:
    adapters = [lora(rank, seed) for rank, seed in ((4, 1), (4, 2), (2, 3), (8, 4))]
    found = gram([column_spaces(adapter) for adapter in adapters], [1.0] * 4)
    full = [dense(adapter) for adapter in adapters]
    expected = [
        [sum(likeness(one[name], other[name]) for name in one) for other in full] for one in full
    ]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        found.diagonal(), torch.full((4,), 2.0, dtype=torch.float64), rtol=1e-6, atol=0
    )  # two modules


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20), factor=st.floats(1e-3, 1e3), rank=st.integers(1, 6))
def test_neither_the_size_of_an_update_nor_its_factors_matter(
    seed: int, factor: float, rank: int
) -> None:
    """(B G)(G^-1 A) is the same update for every orthogonal G, stretched or not."""
    adapter, other = lora(rank, seed), lora(rank, seed + 1)
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed))).Q
    turned = {}
    for name, (down, up) in modules(adapter).items():
        turned[f"{name}.lora_A.weight"], turned[f"{name}.lora_B.weight"] = (
            turn.T @ down,
            factor * up @ turn,
        )
    spaces = [column_spaces(each) for each in (adapter, turned, other)]
    products = gram(spaces, [1.0] * 3)
    torch.testing.assert_close(products[0], products[1], rtol=1e-4, atol=1e-4)


def test_columns_of_zeros_and_directions_that_A_does_not_read_add_nothing() -> None:
    small, other = lora(2, 1), lora(3, 2)
    padded = {
        name: torch.cat([tensor, lora(2, 5)[name]])
        if ".lora_A." in name
        else torch.cat([tensor, torch.zeros_like(tensor)], dim=1)
        for name, tensor in small.items()
    }
    repeated = {
        name: torch.cat([tensor, tensor], dim=0 if ".lora_A." in name else 1)
        for name, tensor in small.items()
    }
    products = gram([column_spaces(each) for each in (small, padded, repeated, other)], [1.0] * 4)
    torch.testing.assert_close(products[1:3], products[:1].expand(2, -1), rtol=1e-5, atol=1e-5)


def test_a_zero_update_points_nowhere() -> None:
    spaces = column_spaces(start(4))
    assert not any(bool(tensor.any()) for tensor in spaces.values())
    assert not bool(gram([spaces], [1.0]).any())
    assert not bool(product_sketches([spaces], [1.0], 16).any())


@pytest.mark.parametrize("rank", [12, 20])
def test_a_rank_above_the_width_spans_what_there_is(rank: int) -> None:
    """14 x 12 and 10 x 12: column spaces of 12 of 14 and of all 10 dimensions."""
    spaces = modules(column_spaces(lora(rank, 0)))
    assert [up.shape[1] for _, up in spaces.values()] == [12, 10]
