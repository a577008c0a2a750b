"""Merged adapters load with plain PEFT and are what the weights say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmira.adapters import modules
from fedmira.errors import ConfigError, RunFolderError
from fedmira.fleet import WAYS, merge_fleet, read_fleet
from fedmira.model import read_lora_folder


def products(update: Any) -> dict[str, torch.Tensor]:
    return {name: up.double() @ down.double() for name, (down, up) in modules(update).items()}


def test_a_mean_of_two_is_that_of_their_products_with_plain_peft(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    folders = [
        make("one"),
        make("two", 1, r=2, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    ]
    made = merge_fleet(read_fleet(folders), "uniform", rank=6)
    assert made.tail == pytest.approx(0, abs=1e-6)  # 4 + 2 directions
    back = products(read_lora_folder(made.save(tmp_path / "merged")).update)
    parts = [products(read_lora_folder(folder).update) for folder in folders]
    for name, product in back.items():
        expected = sum(0.5 * part[name] for part in parts if name in part)
        assert torch.allclose(product, expected, atol=1e-5)


def test_equal_adapters_merge_to_themselves(
    make: Callable[..., Path], logits: Any, tmp_path: Path
) -> None:
    folder = make("one")
    fleet = read_fleet({"a": folder, "b": folder, "c": folder})
    for way in WAYS:
        if way in ("rows", "precision"):  # which only a run can tell
            continue
        made = merge_fleet(fleet, way, keep=1.0)
        assert torch.allclose(logits(made.save(tmp_path / way)), logits(folder), atol=1e-4), way


def test_strength_multiplies_the_product(make: Callable[..., Path]) -> None:
    fleet = read_fleet([make("one"), make("two", 1)])
    one, four = (merge_fleet(fleet, strength=c, rank=3) for c in (1.0, 4.0))
    assert one.weights == four.weights and four.tail == pytest.approx(4 * one.tail)
    for name, product in products(four.update).items():
        assert torch.allclose(product, 4 * products(one.update)[name], atol=1e-5)


def test_the_folder_says_how_it_was_made(make: Callable[..., Path], tmp_path: Path) -> None:
    made = merge_fleet(read_fleet([make("one"), make("two", 1)]), rank=3)
    place = made.save(tmp_path / "merged")
    card = (place / "README.md").read_text()
    assert "cut to rank 3" in card and "No loss was measured" in card and str(tmp_path) not in card
    told = json.loads((place / "merge.json").read_text())
    assert told["weights"].keys() == {"one", "two"} and sum(told["weights"].values()) == 1
    with pytest.raises(RunFolderError, match="never overwritten"):
        made.save(place)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"by": "precision"}, "plain folders have none"),
        ({"by": "mean"}, "by 'mean' is not known; choose from metagpt, rows, uniform, ties"),
        ({"by": "rows"}, "the training rows of one, two are not known"),
        ({"strength": "auto"}, "plain folders have none"),
        ({"strength": "much"}, "give a number above 0, or 'auto'"),
        ({"rank": 0}, "rank is 0"),
        ({"keep": 0.0}, "keep is 0"),
        ({"weights": [1.0]}, "1 weights for 2 clients"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(
    make: Callable[..., Path], arguments: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        merge_fleet(read_fleet([make("one"), make("two", 1)]), **arguments)
