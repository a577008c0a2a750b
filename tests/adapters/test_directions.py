"""Directions made from seeds, and movements as sums of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmira.adapters import digest
from fedmira.adapters.directions import (
    direction,
    moved_along,
    movement,
    summed_movements,
)


def start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {"b": torch.randn(30, 40, generator=generator), "a": torch.randn(7, generator=generator)}


def test_a_direction_is_the_same_for_everybody_and_another_for_each_seed() -> None:
    here, there = direction(3, start()), direction(3, dict(sorted(start().items())))
    assert digest(here) == digest(there), "the order in which an adapter was stored does not matter"
    assert digest(here) != digest(direction(4, start()))
    assert {name: part.shape for name, part in here.items()} == {
        name: part.shape for name, part in start().items()
    }
    assert abs(float(here["b"].mean())) < 0.1 and abs(float(here["b"].std()) - 1) < 0.1


def test_moving_along_directions_is_the_sum_written_out() -> None:
    moved = moved_along(start(), movement({9: -0.25, 2: 0.5}))
    for name, tensor in start().items():
        expected = tensor + 0.5 * direction(2, start())[name] - 0.25 * direction(9, start())[name]
        assert (
            torch.allclose(moved[name], expected, atol=1e-6) and moved[name].dtype == torch.float32
        )


def test_movements_add_up_seed_by_seed() -> None:
    total = summed_movements([movement({1: 1.0, 5: -2.0}), movement({5: 4.0, 3: 8.0})], [1.0, 0.25])
    assert total["seeds"].tolist() == [1, 3, 5] and total["coefficients"].tolist() == [
        1.0,
        2.0,
        -1.0,
    ]
    assert total["seeds"].dtype == torch.int32 and total["coefficients"].dtype == torch.float32


def test_no_movement_leaves_the_start_as_it_is() -> None:
    assert digest(moved_along(start(), movement({}))) == digest(start())
