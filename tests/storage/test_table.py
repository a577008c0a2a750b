"""The store names files by content and keeps little in memory.

A table is a value that shares what did not change.
"""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedmira.adapters import (
    Adapter,
    LazyAdapters,
    content_hash,
    digest,
    replaced,
)
from fedmira.errors import RunFolderError
from fedmira.storage import AdapterStore, AdapterTable

BYTES = 2 * 3 * 4 * 4
"""Of one adapter of `adapter`: two factors of 3 x 4 float32 entries."""


def adapter(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {f"m.{part}.weight": torch.randn(3, 4, generator=draw) for part in ("lora_B", "lora_A")}


def files(store: AdapterStore) -> set[str]:
    return {path.name for path in store.folder.iterdir()}


def assert_same(found: Adapter, expected: Adapter) -> None:
    assert list(found) == sorted(expected), "in alphabetical order, wherever they come from"
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_an_adapter_comes_back_bit_for_bit_from_memory_and_from_the_file(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    odd = {
        "b": torch.tensor([0.1, -0.0, float("inf")]),
        "a": torch.randn(4, 6).T[::2],
        "steps": torch.tensor(7),
        "none": torch.zeros(0, 3),
    }
    key = store.put(odd)
    for place in (store, AdapterStore(tmp_path / "adapters")):
        assert_same(place.get(key), odd)
    assert str(store.get(key)["b"][1]) == "tensor(-0.)"


def test_the_key_is_the_content_hash_whatever_the_order_of_names(tmp_path: Path) -> None:
    store, one = AdapterStore(tmp_path), adapter(1)
    key = store.put(one)
    assert (
        key == content_hash(one) == content_hash(dict(reversed(one.items())))
        and len(key) == 64
        and key.startswith(digest(one))
    )
    assert content_hash(store.get(key)) == key
    changed = {**one, "m.lora_A.weight": one["m.lora_A.weight"].clone()}
    changed["m.lora_A.weight"][2, 3] += 1e-6
    assert content_hash(changed) != key
    assert content_hash({name: tensor.reshape(4, 3) for name, tensor in one.items()}) != key


def test_equal_adapters_are_one_file_and_are_written_once(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    assert {store.put(adapter(1)) for _ in range(3)} == {content_hash(adapter(1))}
    assert files(store) == {content_hash(adapter(1)) + ".safetensors"} and len(store) == 1
    written = (store.folder / (content_hash(adapter(1)) + ".safetensors")).stat().st_mtime_ns
    again = AdapterStore(tmp_path / "adapters")
    again.put(adapter(1))
    assert (
        store.folder / (content_hash(adapter(1)) + ".safetensors")
    ).stat().st_mtime_ns == written


def test_a_view_does_not_keep_the_stack_it_was_cut_from(tmp_path: Path) -> None:
    stack = torch.randn(64, 3, 4)
    store = AdapterStore(tmp_path)
    kept = store.get(store.put({"m.lora_A.weight": stack[5]}))["m.lora_A.weight"]
    assert kept.untyped_storage().nbytes() == 3 * 4 * 4
    stack.zero_()
    assert bool(kept.any())


def test_memory_holds_the_adapters_used_last_up_to_a_limit(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, cache_bytes=2 * BYTES)
    one, two, three = (store.put(adapter(seed)) for seed in (1, 2, 3))
    first = store.get(two)
    assert store.get(two) is first, "two and three are in memory"
    store.get(one)  # takes the place of three, which was used before two
    assert store.get(two) is first
    store.get(three)
    store.get(one)
    assert store.get(two) is not first
    wide = AdapterStore(tmp_path, cache_bytes=1)
    assert wide.get(one) is wide.get(one), "one stays, however large"


def test_only_adapters_in_use_survive_a_sweep(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    one, two, three = (store.put(adapter(seed)) for seed in (1, 2, 3))
    store.flush([one, two])
    assert store.sweep({two, "another key"}) == 2
    assert files(store) == {two + ".safetensors"} and (
        one in store,
        two in store,
        three in store,
    ) == (False, True, False)
    with pytest.raises(RunFolderError, match=f"{one}.safetensors: the adapter cannot be read"):
        store.get(one)
    assert store.put(adapter(1)) == one and one in store
    assert_same(AdapterStore(tmp_path).get(one), adapter(1))


def test_what_a_crash_left_half_written_is_no_adapter(tmp_path: Path) -> None:
    key = content_hash(adapter(1))
    (tmp_path / f"{key}.partial").write_bytes(b"half")
    store = AdapterStore(tmp_path)
    assert key not in store and store.put(adapter(1)) == key
    assert_same(AdapterStore(tmp_path).get(key), adapter(1))
    (tmp_path / f"{key}.partial").write_bytes(b"half")
    store.remove_halves()
    assert files(store) == {f"{key}.safetensors"}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    key = AdapterStore(tmp_path).put(adapter(1))
    os.truncate(tmp_path / f"{key}.safetensors", 20)
    with pytest.raises(
        RunFolderError,
        match=rf"{key}\.safetensors: the adapter cannot be read .* restore the file or start a "
        r"new run",
    ):
        AdapterStore(tmp_path).get(key)


def test_a_table_is_a_mapping_that_shares_what_did_not_change(tmp_path: Path) -> None:
    store, start = AdapterStore(tmp_path), adapter(0)
    table = AdapterTable.of(store, {name: start for name in "abc"})
    assert len(store) == 1, "the common start is one file"
    later = replaced(table, {"b": adapter(1), "d": adapter(2)})
    assert isinstance(later, AdapterTable)
    assert (
        list(table) == ["a", "b", "c"] and list(later) == ["a", "b", "c", "d"] and len(store) == 3
    )
    assert_same(table["b"], start)
    for name, expected in {"a": start, "b": adapter(1), "c": start, "d": adapter(2)}.items():
        assert_same(later[name], expected)
        assert later.hashes[name] == content_hash(expected) and later.digest_of(name) == digest(
            expected
        )
    assert "d" in later and "d" not in table and table.get("d") is None
    with pytest.raises(KeyError):
        table["d"]
    assert AdapterTable.of(store, table) is table


def test_asking_who_is_in_a_table_reads_no_file(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, cache_bytes=0)
    table = AdapterTable.of(store, {"a": adapter(1), "b": adapter(2)})
    for path in tmp_path.iterdir():
        path.unlink()
    assert (
        "a" in table
        and list(table) == ["a", "b"]
        and len(table) == 2
        and set(table.hashes) == {"a", "b"}
    )
    assert set(table.replaced({"c": adapter(3)})) == {"a", "b", "c"}


def test_plain_mappings_are_replaced_as_plain_mappings() -> None:
    before = {"a": adapter(1), "b": adapter(2)}
    after = replaced(before, {"b": adapter(3)})
    assert (
        isinstance(after, dict)
        and after["a"] is before["a"]
        and digest(after["b"]) == digest(adapter(3))
    )
    assert digest(before["b"]) == digest(adapter(2))


def test_lazy_adapters_read_when_asked_and_keep_nothing() -> None:
    asked: list[str] = []

    def read(name: str) -> Adapter:
        asked.append(name)
        return adapter(len(asked))

    lazy = LazyAdapters(["b", "a"], read)
    assert (
        list(lazy) == ["b", "a"]
        and len(lazy) == 2
        and "a" in lazy
        and "c" not in lazy
        and asked == []
    )
    assert (
        digest(lazy["a"]) == digest(adapter(1))
        and digest(lazy["a"]) == digest(adapter(2))
        and asked == ["a", "a"]
    )
    with pytest.raises(KeyError):
        lazy["c"]


@given(
    steps=st.lists(
        st.dictionaries(st.sampled_from("abcd"), st.integers(0, 5), max_size=3), max_size=6
    )
)
def test_a_table_behaves_like_a_dict(
    steps: list[dict[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = AdapterStore(tmp_path_factory.mktemp("store"), cache_bytes=BYTES)
    table, expected = AdapterTable(store, {}), {}
    history = [(table, dict(expected))]
    for changes in steps:
        table = table.replaced({name: adapter(seed) for name, seed in changes.items()})
        expected |= changes
        history.append((table, dict(expected)))
    for value, seeds in history:  # older tables keep their values
        assert list(value) == list(seeds)
        for name, seed in seeds.items():
            assert_same(value[name], adapter(seed))
    store.sweep(set(table.hashes.values()))
    assert len(store) == len(set(expected.values()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_many_rounds_leave_files_memory_and_open_files_as_they_were(tmp_path: Path) -> None:
    store, draw = AdapterStore(tmp_path, cache_bytes=4 * BYTES), random.Random(0)
    table = AdapterTable.of(store, {str(client): adapter(0) for client in range(20)})

    def rounds(count: int) -> None:
        nonlocal table
        for _ in range(count):
            chosen = draw.sample(range(20), 4)
            table = table.replaced(
                {str(client): adapter(draw.randrange(1, 2**30)) for client in chosen}
            )
            for name in table:
                table[name]
            store.flush(table.hashes.values())
            store.sweep(set(table.hashes.values()))

    def held() -> tuple[int, int, int]:
        """Files of the store, open files of this process, tensors in memory."""
        gc.collect()
        tensors = sum(type(thing) is Tensor for thing in gc.get_objects())
        return len(list(tmp_path.iterdir())), len(os.listdir("/proc/self/fd")), tensors

    rounds(40)  # everybody has been changed
    before = held()
    rounds(60)
    assert held() == before and before[0] == 20
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8"), (
        "no file stays mapped"
    )
