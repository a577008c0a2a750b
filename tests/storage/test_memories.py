"""Private memories on disk: a table that never changes, parts and numbers kept apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedmira.adapters import HashedAdapter, digest
from fedmira.experiment import build_experiment
from fedmira.messages import Payload, Request
from fedmira.model import BaseModel
from fedmira.storage import AdapterStore, MemoryTable, remembered
from small import local_of, make_config


def adapter(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {f"m.{part}.weight": torch.randn(3, 2, generator=draw) for part in ("lora_B", "lora_A")}


def memory(seed: int, steps: float) -> Payload:
    return Payload(
        {"optimizer.first": adapter(seed), "optimizer.second": adapter(seed + 1)},
        {"optimizer.steps": steps},
    )


def assert_same(found: Payload, expected: Payload) -> None:
    assert found.scalars == expected.scalars and list(found.tensors) == list(expected.tensors)
    for part, tensors in expected.tensors.items():
        assert digest(found.tensors[part]) == digest(tensors) and set(found.tensors[part]) == set(
            tensors
        )


def test_memories_come_back_and_a_former_table_keeps_its_own(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    first = remembered(MemoryTable(store, {}), {"a": memory(1, 3.0), "b": memory(5, 3.0)})
    second = remembered(first, {"a": memory(9, 6.0), "c": Payload({"nothing": {}}, {"n": 0.5})})
    assert (
        isinstance(second, MemoryTable)
        and set(first) == {"a", "b"}
        and set(second) == {"a", "b", "c"}
    )
    assert_same(first["a"], memory(1, 3.0))
    for client, expected in {
        "a": memory(9, 6.0),
        "b": memory(5, 3.0),
        "c": Payload({"nothing": {}}, {"n": 0.5}),
    }.items():
        assert_same(second[client], expected)
    assert second.entries["b"] is first.entries["b"], "what did not change is shared"
    assert len(store) == 4


def test_a_table_made_from_its_entries_is_the_same(tmp_path: Path) -> None:
    table = MemoryTable.of(AdapterStore(tmp_path), {"a": memory(1, 3.0)})
    assert MemoryTable.of(table.store, table) is table
    again = MemoryTable(AdapterStore(tmp_path), table.entries)
    assert_same(again["a"], memory(1, 3.0))


def test_asking_who_has_a_memory_reads_no_file(tmp_path: Path) -> None:
    table = MemoryTable.of(
        AdapterStore(tmp_path, cache_bytes=0), {"a": memory(1, 3.0), "b": memory(3, 3.0)}
    )
    for path in tmp_path.iterdir():
        path.unlink()
    assert "a" in table and "c" not in table and len(table) == 2 and list(table) == ["a", "b"]
    with pytest.raises(KeyError):
        table["c"]


def test_plain_memories_stay_plain() -> None:
    before = {"a": memory(1, 3.0)}
    after = remembered(before, {"b": memory(3, 3.0)})
    assert isinstance(after, dict) and set(before) == {"a"} and after["a"] is before["a"]


class Counting(AdapterStore):
    """A store that notes what is read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, cache_bytes=0)
        self.read: list[str] = []

    def get(self, key: str) -> HashedAdapter:
        self.read.append(key)
        return super().get(key)


def test_the_memories_of_a_round_are_read_once_and_no_others(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {"algorithm.name": "local", "local.optimizer_state": "kept"}
    experiment = build_experiment(make_config(base_folder, clients_folder, settings), base)
    state = experiment.algorithm.initial_state(experiment.starts)
    requests = [
        Request(client, 1, 0, experiment.algorithm.instruct(state, client))
        for client in experiment.ranks
    ]
    engine, store = (
        local_of(experiment, 2),
        Counting(tmp_path),
    )
    engine.restore(MemoryTable(store, {}))
    engine.train(requests)
    before = engine.memories
    assert (
        isinstance(before, MemoryTable)
        and set(before) == set(experiment.ranks)
        and store.read == []
    )
    engine.train(requests[1:4])
    assert store.read == [before.entries[request.client_id].key for request in requests[1:4]]
    after = engine.memories
    assert isinstance(after, MemoryTable)
    changed = {client for client in after if after.entries[client] != before.entries[client]}
    assert changed == {request.client_id for request in requests[1:4]}
