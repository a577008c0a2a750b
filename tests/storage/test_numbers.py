"""Large tensors of the state come back bit for bit from patches.

A round stores the rows that changed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmira.storage import AdapterStore, NumberStore, numbers
from fedmira.storage.numbers import LARGE_BYTES

ROWS, WIDTH = 4096, 128
"""Of a float32 tensor of 2 MiB."""


def tensor(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def changed(before: Tensor, rows: list[int], seed: int) -> Tensor:
    after = before.clone()
    after[rows] = torch.randn(len(rows), WIDTH, generator=torch.Generator().manual_seed(seed))
    return after


def stored_bytes(store: AdapterStore) -> int:
    return (
        sum(path.stat().st_size for path in store.folder.iterdir()) if store.folder.exists() else 0
    )


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    assert (left.shape, left.dtype) == (right.shape, right.dtype)
    assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def test_small_tensors_are_left_to_the_caller(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    given = {
        "last_round": torch.arange(5),
        "edge": torch.zeros(LARGE_BYTES // 4),
        "one": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
    }
    small, large = NumberStore(store).put(given)
    assert large == {} and len(store) == 0
    assert set(small) == set(given) and all(torch.equal(small[name], given[name]) for name in given)


def test_rows_that_changed_are_what_is_written(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    kept, value, others = (
        NumberStore(store),
        torch.zeros(ROWS, WIDTH),
        {"last_round": torch.zeros(3)},
    )
    kept.put({"sketch": value, **others})
    assert stored_bytes(store) == 0, "zeros need no patch"
    value = changed(value, [7, 4000], 1)
    _, places = kept.put({"sketch": value, **others})
    assert 2 * WIDTH * 4 < stored_bytes(store) < 2 * WIDTH * 4 + 1000
    kept.put({"sketch": value.clone(), **others})
    assert len(store) == 1, "nothing changed, nothing is written"
    value = changed(value, [4000, 5], 2)
    _, places = kept.put({"sketch": value, **others})
    assert len(store) == 2 and places["sketch"]["rows"] == 4
    assert_same_bits(NumberStore(store).get(places)["sketch"], value)


def test_a_chain_that_grows_long_is_stored_anew(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    kept, value = NumberStore(store), tensor()
    places = kept.put({"sketch": value})[1]
    sizes = []
    for number in range(12):
        value = changed(value, list(range(number, ROWS, 4)), number)
        places = kept.put({"sketch": value})[1]
        store.sweep(set(places["sketch"]["patches"]))
        sizes.append(stored_bytes(store))
        assert_same_bits(NumberStore(store).get(places)["sketch"], value)
    # 1 + 4 quarters fill twice the rows; the next would not fit, so the tensor is stored anew, and
    # so on
    assert [round(4 * size / (ROWS * WIDTH * 4)) for size in sizes] == [
        5,
        6,
        7,
        8,
        4,
        5,
        6,
        7,
        8,
        4,
        5,
        6,
    ]


def test_another_shape_starts_anew(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    kept = NumberStore(store)
    kept.put({"sketch": tensor()})
    wider = torch.randn(ROWS, WIDTH + 1)
    for value in (
        wider,
        wider.double(),
        wider.flatten(),
        wider.to(torch.bfloat16).reshape(ROWS, 3, -1),
    ):
        places = kept.put({"sketch": value})[1]
        assert_same_bits(NumberStore(store).get(places)["sketch"], value)


def test_a_chain_goes_on_after_it_was_read(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    places = NumberStore(store).put({"sketch": tensor()})[1]
    before = len(store)
    again = NumberStore(store)
    value = changed(again.get(places)["sketch"], [3], 1)
    places = again.put({"sketch": value})[1]
    assert len(store) == before + 1
    assert_same_bits(NumberStore(store).get(places)["sketch"], value)


@given(
    rounds=st.lists(
        st.lists(
            st.tuples(st.integers(0, 5), st.sampled_from([0.0, -0.0, 1.5, float("nan")])),
            max_size=4,
        ),
        max_size=8,
    )
)
@settings(deadline=None)
def test_any_chain_of_changes_comes_back(
    rounds: list[list[tuple[int, float]]],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch_module: pytest.MonkeyPatch,
) -> None:
    monkeypatch_module.setattr(numbers, "LARGE_BYTES", 0)
    monkeypatch_module.setattr(numbers, "_BLOCK_BYTES", 16)
    store = AdapterStore(tmp_path_factory.mktemp("numbers"))
    kept, value = NumberStore(store), torch.zeros(6, 2, dtype=torch.float64)
    for changes in rounds:
        value = value.clone()
        for row, entry in changes:
            value[row, row % 2] = entry
        places = kept.put({"sketch": value})[1]
        store.sweep(set(places["sketch"]["patches"]))
        assert_same_bits(NumberStore(store).get(places)["sketch"], value)


@pytest.fixture(scope="module")
def monkeypatch_module() -> object:
    with pytest.MonkeyPatch.context() as patch:
        yield patch
