"""The short form of `make torture`: a few kills, refusals and flipped bits, on one method."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from small import write_clients
from torture.faults import killing_at
from torture.trials import (
    Arena,
    Tally,
    cache_trial,
    fault_trial,
    flip_trial,
    kill_trial,
    memory_trial,
)

METHOD = "mira, kept moments"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="faults are injected by fork and /proc, which Linux has"
)


@pytest.fixture(scope="module")
def arena(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Arena:
    place = tmp_path_factory.mktemp("arena")
    rows = write_clients(place / "rows", {"apple-1": 14, "apple-2": 10, "birch-1": 12})
    return Arena(place, base_folder, rows)


def test_killed_runs_resume_to_equal_bytes(arena: Arena) -> None:
    tally, draw = Tally(), random.Random(1)
    for _ in range(3):
        kill_trial(arena, METHOD, draw, tally)
    assert not tally.bad and tally["killed"] >= 2 and tally["resumed to equal bytes"] == 3, tally


def test_what_the_system_refuses_is_one_line_and_nothing_is_lost(arena: Arena) -> None:
    tally, draw = Tally(), random.Random(2)
    for _ in range(3):
        fault_trial(arena, METHOD, draw, tally)
    assert not tally.bad and tally["resumed to equal bytes"] == 3, (tally, tally.bad)


def test_flipped_bits_are_named_and_change_no_result(arena: Arena) -> None:
    tally, draw = Tally(), random.Random(3)
    _, operations = arena.whole(METHOD)
    cut = arena.fresh()
    arena.go_on(METHOD, cut, lambda: killing_at(cut, operations * 2 // 3))
    for _ in range(4):
        flip_trial(arena, METHOD, cut, draw, tally)
    assert not tally.bad, tally.bad


def test_damaged_memories_and_caches_are_never_used(tmp_path: Path) -> None:
    tally, draw = Tally(), random.Random(4)
    for name in ("memory", "cache"):
        (tmp_path / name).mkdir()
    for _ in range(40):
        memory_trial(tmp_path / "memory", draw, tally)
    for _ in range(10):
        cache_trial(tmp_path / "cache", draw, tally)
    assert not tally.bad and tally["named"] >= 30 and tally["named and made anew"] == 10, tally
