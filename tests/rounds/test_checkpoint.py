"""Checkpoints come back as they were, are whole or absent, and say so when they are damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedmira.adapters import Adapter
from fedmira.algorithms import ServerState
from fedmira.errors import RunFolderError
from fedmira.messages import Payload
from fedmira.rounds import Checkpoint, load_checkpoint, save_checkpoint


def adapter(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {f"m.{part}.weight": torch.randn(3, 2, generator=draw) for part in ("lora_A", "lora_B")}


def checkpoint(round_number: int = 4) -> Checkpoint:
    shared = adapter(1)  # clients may hold the very same tensors, as all do before round 1
    state = ServerState(
        {"a": shared, "b": shared, "c": adapter(2)}, {"graph": torch.rand(3, 3, dtype=torch.float64), "last_round": torch.tensor([1, 0, 4])}
    )
    memories = {
        "a": Payload({"optimizer.first": adapter(3), "optimizer.second": adapter(4)}, {"optimizer.steps": 7.0}),
        "b": Payload({}, {"n": 0.1}),
    }
    return Checkpoint(round_number, state, memories, {"a": adapter(5)}, {"b": adapter(6)}, {"best": {"a": [1, 0.25]}, "graph": None})


def assert_same(left: Adapter, right: Adapter) -> None:
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name])


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = checkpoint()
    save_checkpoint(tmp_path / "checkpoint", saved)
    loaded = load_checkpoint(tmp_path / "checkpoint")
    assert loaded is not None and (loaded.round, loaded.values) == (4, saved.values)
    for kind in ("uploaded", "best"):
        assert set(getattr(loaded, kind)) == set(getattr(saved, kind))
        for client, tensors in getattr(saved, kind).items():
            assert_same(tensors, getattr(loaded, kind)[client])
    assert set(loaded.state.adapters) == set(saved.state.adapters)
    for client, tensors in saved.state.adapters.items():
        assert_same(tensors, loaded.state.adapters[client])
    assert_same(saved.state.numbers, loaded.state.numbers)
    assert set(loaded.memories) == {"a", "b"}
    for client, memory in saved.memories.items():
        assert loaded.memories[client].scalars == memory.scalars and set(loaded.memories[client].tensors) == set(memory.tensors)
        for part, tensors in memory.tensors.items():
            assert_same(tensors, loaded.memories[client].tensors[part])


def test_no_folder_and_an_empty_folder_hold_no_checkpoint(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "nowhere") is None
    assert load_checkpoint(tmp_path) is None


def test_only_the_newest_round_stays(tmp_path: Path) -> None:
    for number in (0, 1, 9, 10):
        save_checkpoint(tmp_path, checkpoint(number))
        assert [path.name for path in tmp_path.iterdir()] == [f"round-{number:06d}"]
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.round == 10


def test_a_half_written_checkpoint_is_passed_over_and_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(4))
    half = tmp_path / "round-000005.partial"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.round == 4
    save_checkpoint(tmp_path, checkpoint(5))
    assert [path.name for path in tmp_path.iterdir()] == ["round-000005"]


def test_a_crash_before_old_rounds_are_removed_leaves_the_newest_in_charge(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "older", checkpoint(4))
    save_checkpoint(tmp_path / "newer", checkpoint(5))
    both = tmp_path / "both"
    both.mkdir()
    for place in ("older", "newer"):
        for path in (tmp_path / place).iterdir():
            path.rename(both / path.name)
    loaded = load_checkpoint(both)
    assert loaded is not None and loaded.round == 5


@pytest.mark.parametrize("name", ["tensors.safetensors", "values.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_a_damaged_checkpoint_is_named_with_the_next_step(tmp_path: Path, name: str, damage: str) -> None:
    save_checkpoint(tmp_path, checkpoint(4))
    path = tmp_path / "round-000004" / name
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"\xff\xfe no checkpoint")
    with pytest.raises(RunFolderError, match=r"round-000004: the checkpoint is damaged .* remove it"):
        load_checkpoint(tmp_path)
