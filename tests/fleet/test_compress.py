"""Compressed adapters are the nearest of their rank, alone and around a merged one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmira.adapters import modules, singular_values
from fedmira.errors import ConfigError
from fedmira.fleet import compress_fleet, merge_fleet, read_fleet
from fedmira.model import read_lora_folder


def products(update: Any) -> dict[str, torch.Tensor]:
    return {name: up.double() @ down.double() for name, (down, up) in modules(update).items()}


def test_the_full_rank_is_exact_with_plain_peft(
    make: Callable[..., Path], logits: Any, tmp_path: Path
) -> None:
    settings = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
    folder = make("one", **settings)
    made = compress_fleet(read_fleet([folder]), rank=4)
    made.save(tmp_path / "small")
    assert made.members[0].error == pytest.approx(0, abs=1e-7)
    assert torch.allclose(logits(tmp_path / "small/one"), logits(folder), atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_error_is_the_tail_and_bytes_are_those_of_the_rank(
    make: Callable[..., Path], tmp_path: Path, rank: int
) -> None:
    folder = make("one")
    member = read_lora_folder(folder)
    (each,) = compress_fleet(read_fleet([folder]), rank=rank).members
    values = singular_values(member.update)
    whole = sum(float(of.square().sum()) for of in values.values())
    tail = sum(float(of[rank:].square().sum()) for of in values.values())
    assert each.error == pytest.approx(math.sqrt(tail / whole), rel=1e-5)
    assert each.kept == pytest.approx(1 - tail / whole, rel=1e-5)
    difference = sum(
        float((products(member.update)[name] - product).square().sum())
        for name, product in products(each.update).items()
    )
    assert math.sqrt(difference / whole) == pytest.approx(each.error, rel=1e-4)
    sizes = [
        sum(part.shape[1 - axis] for axis, part in enumerate(pair))
        for pair in modules(member.tensors).values()
    ]
    assert each.size == sum(rank * size * 4 for size in sizes)
    assert each.scales == member.scales, "alpha' = alpha q / r"


def test_energy_takes_the_smallest_rank_and_the_rank_caps_it(make: Callable[..., Path]) -> None:
    fleet = read_fleet([make("one"), make("two", 1)])
    for each in compress_fleet(fleet, energy=0.7).members:
        assert each.kept >= 0.7
        assert (
            compress_fleet(fleet.only([each.member.name]), rank=each.rank - 1).members[0].kept < 0.7
        )
    assert {each.rank for each in compress_fleet(fleet, rank=1, energy=0.99).members} == {1}


def test_around_a_merged_adapter_both_parts_together_are_the_client(
    make: Callable[..., Path], logits: Any, tmp_path: Path
) -> None:
    folders = [make("one"), make("two", 1, lora_alpha=4)]
    made = compress_fleet(read_fleet(folders), rank=8, around="metagpt")
    place = made.save(tmp_path / "small", joined=True)
    for folder in folders:
        expected = logits(folder)
        together = logits(place / "merged", place / "residuals" / folder.name)
        assert torch.allclose(together, expected, atol=1e-4)
        assert torch.allclose(logits(place / folder.name), expected, atol=1e-4)
        rank = max(read_lora_folder(place / folder.name).ranks.values())
        assert rank == 4 + made.members[0].rank, "R + q"


def test_without_residuals_the_merged_adapter_is_everybodys(
    make: Callable[..., Path], logits: Any, tmp_path: Path
) -> None:
    fleet = read_fleet([make("one"), make("two", 1)])
    place = compress_fleet(fleet, rank=0, around="uniform").save(tmp_path / "small", joined=True)
    merged = merge_fleet(fleet, "uniform").save(tmp_path / "merged")
    assert not (place / "residuals").exists()
    for name in ("merged", "one", "two"):
        assert torch.allclose(logits(place / name), logits(merged), atol=1e-6)


def test_equal_clients_leave_no_residual(make: Callable[..., Path]) -> None:
    folder = make("one")
    fleet = read_fleet({"a": folder, "b": folder})
    made = compress_fleet(fleet, rank=4, around="metagpt")
    assert [each.rank for each in made.members] == [0, 0]
    assert made.figures["bytes_after"] == made.figures["bytes_common"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "give --rank, --energy or both"),
        ({"rank": 0}, "rank is 0; must be a whole number, 1 or more; 0 needs --around"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"rank": 1, "around": "ties"}, "around 'ties' is not known; choose from uniform, metagpt"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(
    make: Callable[..., Path], arguments: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        compress_fleet(read_fleet([make("one"), make("two", 1)]), **arguments)
