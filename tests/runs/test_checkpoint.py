"""Checkpoints come back as they were, are whole or absent, and say so when they are damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedmira.adapters import Adapter, content_hash
from fedmira.errors import RunFolderError
from fedmira.messages import Payload
from fedmira.methods import ServerState
from fedmira.records import RecordedFolder
from fedmira.runs import Checkpoint, CheckpointFolder
from fedmira.storage import AdapterTable


def adapter(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {f"m.{part}.weight": torch.randn(3, 2, generator=draw) for part in ("lora_A", "lora_B")}


def checkpoint(round_number: int = 4) -> Checkpoint:
    shared = adapter(1)  # clients may hold the very same tensors, as all do before round 1
    state = ServerState(
        {"a": shared, "b": shared, "c": adapter(2)},
        {"graph": torch.rand(3, 3, dtype=torch.float64), "last_round": torch.tensor([1, 0, 4])},
    )
    memories = {
        "a": Payload(
            {"optimizer.first": adapter(3), "optimizer.second": adapter(4)},
            {"optimizer.steps": 7.0},
        ),
        "b": Payload({"nothing": {}}, {"n": 0.1}),
    }
    values = {"best": {"a": [1, 0.25]}, "ever_moved": False}
    return Checkpoint(
        round_number,
        state,
        memories,
        {"a": adapter(5)},
        {"b": adapter(6)},
        values,
        '{"kind": "random"}\n',
    )


def assert_same(left: Adapter, right: Adapter) -> None:
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name])


def kept_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def file_of(tensors: Adapter) -> str:
    return f"adapters/{content_hash(tensors)}.safetensors"


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = checkpoint()
    CheckpointFolder(tmp_path / "checkpoint").save(saved)
    loaded = CheckpointFolder(tmp_path / "checkpoint").load()
    assert loaded is not None and (loaded.round, loaded.values, loaded.graph_json) == (
        4,
        saved.values,
        saved.graph_json,
    )
    for found, expected in (
        (loaded.uploaded, saved.uploaded),
        (loaded.best, saved.best),
        (loaded.state.adapters, saved.state.adapters),
    ):
        assert set(found) == set(expected)
        for client, tensors in expected.items():
            assert_same(tensors, found[client])
    assert_same(saved.state.numbers, loaded.state.numbers)
    assert set(loaded.memories) == {"a", "b"}
    for client, memory in saved.memories.items():
        assert loaded.memories[client].scalars == memory.scalars and set(
            loaded.memories[client].tensors
        ) == set(memory.tensors)
        for part, tensors in memory.tensors.items():
            assert_same(tensors, loaded.memories[client].tensors[part])


def test_no_folder_and_an_empty_folder_hold_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "nowhere").load() is None
    assert CheckpointFolder(tmp_path).load() is None
    assert kept_files(tmp_path) == set() and not (tmp_path / "nowhere").exists()


def test_the_last_two_rounds_and_their_adapters_stay(tmp_path: Path) -> None:
    folder, numbers = CheckpointFolder(tmp_path), (0, 1, 999_999, 1_000_000)
    for before, number in zip((None, *numbers), numbers, strict=False):
        state = ServerState({"a": adapter(100 + number), "b": adapter(7)}, {})
        folder.save(Checkpoint(number, state))
        kept = [number] if before is None else [before, number]
        assert kept_files(tmp_path) == {file_of(adapter(7))} | {
            name
            for each in kept
            for name in (
                f"round-{each:06d}/values.json",
                f"round-{each:06d}/numbers.safetensors",
                f"round-{each:06d}/hashes.sha256",
                file_of(adapter(100 + each)),
            )
        }
    loaded = CheckpointFolder(tmp_path).load()
    assert loaded is not None and loaded.round == 1_000_000, "by number, and not by name"


def test_where_the_newest_round_is_damaged_the_one_before_is_loaded_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever of it is damaged: its own files, their record, or an adapter that it alone needs."""
    for name in (
        "round-000005/values.json",
        "round-000005/numbers.safetensors",
        "round-000005/hashes.sha256",
        file_of(adapter(105)),
    ):
        place = tmp_path / name.replace("/", "-")
        for number in (4, 5):
            state = ServerState({"a": adapter(100 + number), "b": adapter(7)}, {})
            CheckpointFolder(place).save(Checkpoint(number, state))
        content = bytearray((place / name).read_bytes())
        content[len(content) // 2] ^= 1
        (place / name).write_bytes(content)
        caplog.clear()
        folder = CheckpointFolder(place)
        loaded = folder.load()
        assert loaded is not None and loaded.round == 4
        assert name.rpartition("/")[2] in caplog.text and "going on from the" in caplog.text
        folder.tidy(loaded)
        assert not (place / "round-000005").exists()
        folder.save(Checkpoint(5, ServerState({"a": adapter(105), "b": adapter(7)}, {})))
        anew = CheckpointFolder(place).load()
        assert anew is not None and anew.round == 5, "what was damaged was written anew"
        assert_same(anew.state.adapters["a"], adapter(105))


def test_a_growing_file_that_lost_lines_counts_against_the_checkpoint_that_knows_them(
    tmp_path: Path,
) -> None:
    folder = CheckpointFolder(tmp_path)
    for number in (1, 2):
        lines = {"events.jsonl": (10 * number, "0" * 64)}
        folder.save(Checkpoint(number, ServerState({"a": adapter(number)}), beginnings=lines))

    def cut_to_15(beginnings: Mapping[str, tuple[int, str]]) -> list[str]:
        return [name for name, (size, _) in beginnings.items() if size > 15]

    loaded = CheckpointFolder(tmp_path).load(cut_to_15)
    assert loaded is not None and loaded.round == 1
    with pytest.raises(RunFolderError, match=r"events\.jsonl; put it back from a copy"):
        CheckpointFolder(tmp_path).load(list)


def test_a_round_writes_the_adapters_that_changed_and_no_others(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    table = AdapterTable.of(folder.store, {f"client-{k}": adapter(k) for k in range(50)})
    folder.save(Checkpoint(1, ServerState(table)))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "adapters").iterdir()}
    assert len(before) == 50
    moved, sent, moments = (
        adapter(1001),
        adapter(1002),
        Payload({"optimizer.first": adapter(1003)}, {"optimizer.steps": 1.0}),
    )
    state = ServerState(table.replaced({"client-7": moved}))
    folder.save(
        Checkpoint(
            2,
            state,
            {"client-7": moments},
            uploaded={"client-7": sent},
            best={"client-7": adapter(7)},
        )
    )
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "adapters").iterdir()}
    assert len(set(after) - set(before)) == 3, (
        "what was sent, what it became, and the moments; the best is there already"
    )
    assert all(after[path] == written for path, written in before.items() if path in after)
    assert set(before) <= set(after), "client-7's former adapter is still its best"
    for number in (3, 4):
        folder.save(Checkpoint(number, state, {"client-7": moments}, uploaded={"client-7": sent}))
    assert set(before) - set((tmp_path / "adapters").iterdir()) == {tmp_path / file_of(adapter(7))}


def test_every_adapter_is_compared_with_its_name_when_the_checkpoint_is_loaded(
    tmp_path: Path,
) -> None:
    CheckpointFolder(tmp_path).save(checkpoint())
    for path in (tmp_path / "adapters").iterdir():
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        damage = "(its content has another SHA-256 than the one it is named by|cannot be read)"
        with pytest.raises(RunFolderError, match=rf"{path.name}: .*{damage}"):
            CheckpointFolder(tmp_path).load()
        path.write_bytes(whole)
    loaded = CheckpointFolder(tmp_path).load()
    assert loaded is not None and loaded.round == 4


def test_a_half_written_checkpoint_is_passed_over_and_replaced(tmp_path: Path) -> None:
    CheckpointFolder(tmp_path).save(checkpoint(4))
    whole = kept_files(tmp_path)
    half = tmp_path / "round-000005.partial"
    half.mkdir()
    (half / "values.json").write_bytes(b"half")
    (tmp_path / "adapters" / "0123.partial").write_bytes(b"half")
    CheckpointFolder(tmp_path).store.put(adapter(77))
    folder = CheckpointFolder(tmp_path)
    loaded = folder.load()
    assert loaded is not None and loaded.round == 4
    folder.tidy(loaded)
    assert kept_files(tmp_path) == whole, (
        "an adapter of the unfinished round may not be whole on the disk, so it does not stay"
    )
    half.mkdir()
    folder.save(checkpoint(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapters",
        "round-000004",
        "round-000005",
    ]


def test_what_was_written_before_the_first_checkpoint_does_not_stay(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.store.put(adapter(1))
    folder.tidy(folder.load())
    assert kept_files(tmp_path) == set()


def test_a_crash_before_old_rounds_are_removed_leaves_the_newest_in_charge(tmp_path: Path) -> None:
    CheckpointFolder(tmp_path / "older").save(Checkpoint(4, ServerState({"a": adapter(1)})))
    CheckpointFolder(tmp_path / "newer").save(Checkpoint(5, ServerState({"a": adapter(2)})))
    for place in ("older", "newer"):
        shutil.copytree(tmp_path / place, tmp_path / "both", dirs_exist_ok=True)
    folder = CheckpointFolder(tmp_path / "both")
    loaded = folder.load()
    assert loaded is not None and loaded.round == 5
    assert_same(loaded.state.adapters["a"], adapter(2))
    folder.tidy(loaded)
    assert file_of(adapter(1)) in kept_files(tmp_path / "both"), "the older one stays beside it"


@pytest.mark.parametrize("name", ["numbers.safetensors", "values.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_a_damaged_checkpoint_is_named_with_the_next_step(
    tmp_path: Path, name: str, damage: str
) -> None:
    CheckpointFolder(tmp_path).save(checkpoint(4))
    path = tmp_path / "round-000004" / name
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"\xff\xfe no checkpoint")
    with pytest.raises(
        RunFolderError, match=rf"round-000004/{name}: .* (damaged|missing).* put the files back"
    ):
        CheckpointFolder(tmp_path).load()


def test_a_missing_adapter_is_found_when_the_checkpoint_is_loaded(tmp_path: Path) -> None:
    CheckpointFolder(tmp_path).save(checkpoint(4))
    (tmp_path / file_of(adapter(5))).unlink()
    with pytest.raises(
        RunFolderError, match=rf"the checkpoint is damaged \({file_of(adapter(5))} is missing\)"
    ):
        CheckpointFolder(tmp_path).load()


@pytest.mark.parametrize("former", ["tensors in one file", "another number"])
def test_a_checkpoint_of_another_version_is_refused_with_a_clear_word(
    tmp_path: Path, former: str
) -> None:
    CheckpointFolder(tmp_path).save(checkpoint(4))
    values = tmp_path / "round-000004" / "values.json"
    if former == "tensors in one file":
        (tmp_path / "round-000004" / "numbers.safetensors").rename(
            tmp_path / "round-000004" / "tensors.safetensors"
        )
        values.write_text(json.dumps({"round": 4, "scalars": {}, "values": {}}), encoding="utf-8")
    else:
        text = values.read_text(encoding="utf-8").replace('"format": 2', '"format": 3')
        RecordedFolder(values.parent).write(values.name, text)
    with pytest.raises(
        RunFolderError,
        match=r"round-000004: .* written by another version of fedmira.*start a new run",
    ):
        CheckpointFolder(tmp_path).load()
