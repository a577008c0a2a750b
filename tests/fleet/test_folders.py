"""Foreign PEFT folders are read with their true scales, and what is not plain LoRA is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmira.errors import RunFolderError
from fedmira.fleet import read_fleet
from fedmira.model import read_lora_folder, write_alike, write_lora_folder

STRANGE: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 5},
        "alpha_pattern": {"v_proj": 3},
        "use_rslora": True,
    },
    "other layers": {"target_modules": "all-linear", "lora_alpha": 5},
    "one layer": {"target_modules": ["down_proj"], "layers_to_transform": [1]},
}


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("settings", STRANGE.values(), ids=STRANGE)
def test_a_foreign_folder_comes_back_with_equal_logits(
    make: Callable[..., Path], logits: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = make("foreign", **settings)
    member = read_lora_folder(folder)
    write_alike(tmp_path / "alike", member, member.tensors)
    write_lora_folder(tmp_path / "anew", member, member.tensors, member.ranks, member.scales)
    expected = logits(folder)
    assert torch.equal(logits(tmp_path / "alike"), expected)
    assert torch.allclose(logits(tmp_path / "anew"), expected, atol=1e-5)


def test_scales_and_ranks_of_patterns_are_those_of_each_layer(make: Callable[..., Path]) -> None:
    member = read_lora_folder(make("foreign", **STRANGE["patterns"]))
    found = {
        name.removeprefix("base_model.model.model.layers."): (rank, member.scales[name])
        for name, rank in member.ranks.items()
    }
    assert found == {
        "0.self_attn.q_proj": (4, 8 / math.sqrt(4)),
        "0.self_attn.v_proj": (5, 3 / math.sqrt(5)),
        "1.self_attn.q_proj": (2, 8 / math.sqrt(2)),
        "1.self_attn.v_proj": (5, 3 / math.sqrt(5)),
    }


def test_number_types_stay(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make("half")
    path = folder / "adapter_model.safetensors"
    save_file({name: part.half() for name, part in load_file(path).items()}, path)
    member = read_lora_folder(folder)
    write_alike(tmp_path / "again", member, {n: p.float() for n, p in member.tensors.items()})
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    assert all(part.dtype == torch.float16 for part in again.values())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_dora": True}, "use_dora is true: DoRA divides"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA'"),
        ({"use_something_new": True}, "use_something_new is True, which is not known"),
        ({"r": 7}, "has rank 4, and adapter_config.json says 7"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(
    make: Callable[..., Path], settings: dict[str, Any], told: str
) -> None:
    folder = make("foreign")
    change(folder, **settings)
    with pytest.raises(RunFolderError, match=told):
        read_fleet([folder])


def test_dora_of_real_peft_is_refused(make: Callable[..., Path]) -> None:
    with pytest.raises(RunFolderError, match="DoRA"):
        read_lora_folder(make("dora", use_dora=True))


def test_tensors_that_are_no_factors_are_refused(make: Callable[..., Path]) -> None:
    folder = make("foreign")
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.lm_head.weight": torch.ones(2, 2)}, path)
    with pytest.raises(RunFolderError, match=r"it holds base_model.model.lm_head.weight"):
        read_lora_folder(folder)


def test_numbers_that_are_not_finite_are_refused(make: Callable[..., Path]) -> None:
    folder = make("foreign")
    path = folder / "adapter_model.safetensors"
    save_file({name: part / 0 for name, part in load_file(path).items()}, path)
    with pytest.raises(RunFolderError, match="NaN or infinite"):
        read_lora_folder(folder)


def test_a_pickle_is_not_opened(make: Callable[..., Path]) -> None:
    folder = make("foreign")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(RunFolderError, match="a pickle, which can run code"):
        read_lora_folder(folder)


def test_different_bases_are_refused_unless_somebody_says_they_are_one(
    make: Callable[..., Path],
) -> None:
    one, two = make("one"), make("two", 1)
    change(two, base_model_name_or_path="somebody/else")
    with pytest.raises(RunFolderError, match="'two' of 'somebody/else'; adapters of different"):
        read_fleet([one, two])
    assert read_fleet([one, two], "mine").assumed == "they are taken to be of 'mine', as was said"
    change(two, base_model_name_or_path=None)
    with pytest.raises(RunFolderError, match="names no base"):
        read_fleet([one, two])


def test_layers_of_other_sizes_are_refused_whatever_is_said(make: Callable[..., Path]) -> None:
    one, two = make("one"), make("two", 1)
    path = two / "adapter_model.safetensors"
    save_file(
        {n: p[:, :-1].clone() if "lora_A" in n else p for n, p in load_file(path).items()}, path
    )
    with pytest.raises(RunFolderError, match="they are of other bases"):
        read_fleet([one, two], "mine")


def test_folders_get_names_and_a_folder_of_folders_is_read(make: Callable[..., Path]) -> None:
    one, two = make("one"), make("two", 1)
    assert read_fleet([one.parent]).names == ("one", "two")
    assert read_fleet({"left": one, "right": two}).names == ("left", "right")
    with pytest.raises(RunFolderError, match="are both called 'one'; give them as NAME=FOLDER"):
        read_fleet([one, one])
    with pytest.raises(RunFolderError, match=r"there is no adapter_config.json"):
        read_fleet([one.parent / "nowhere"])
