"""The check of a GPU: its plan, what it writes down, and what it makes of what goes wrong."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_check
from gpu_check import MOST_SECONDS, PLAN, Notes, Section
from gpu_work import WORK, Place, rows_of


def results(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_the_plan_fits_one_lease_and_begins_with_what_must_be_right() -> None:
    assert sum(section.seconds for section in PLAN) <= MOST_SECONDS <= 10 * 60
    names = [section.name for section in PLAN]
    right = ["attention", "grouped products", "packed steps", "no waiting", "tests"]
    fast = ["rates", "training", "ways", "profile", "generation", "fused"]
    assert max(map(names.index, right)) < min(map(names.index, fast))


def test_a_dry_run_goes_through_every_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the repository's tests, which would start others from here."""
    plan = tuple(section for section in PLAN if section.name != "tests")
    monkeypatch.setattr(gpu_check, "PLAN", plan)
    status = gpu_check.main(["--dry", "--output", str(tmp_path)])
    found = results(tmp_path)
    assert found["wrong"] == [] and status == 0
    assert found["dry"] and found["finished"]
    assert {f"{section.name}/seconds" for section in plan} <= found.keys()
    assert {name for name in found if name.endswith(("/error", "/left out"))} == set()
    for work in WORK:
        assert found[f"training/llama/{work}/times as fast"] > 0
    assert found["generation/equal answers"] == 1
    assert found["launches/8 clients, counted on meta"] > 0


def test_figures_are_written_down_as_soon_as_they_are_known(tmp_path: Path) -> None:
    notes = Notes(tmp_path, Place(dry=True), 100)
    notes.add("first", 1)
    assert results(tmp_path)["first"] == 1
    notes.add("second", {"a": 2})
    assert (results(tmp_path)["first"], results(tmp_path)["second"]) == (1, {"a": 2})


@pytest.mark.parametrize(
    ("found", "fine"), [(0.0, True), (0.02, True), (0.021, False), (math.nan, False)]
)
def test_a_difference_that_is_too_large_is_wrong(tmp_path: Path, found: float, fine: bool) -> None:
    notes = Notes(tmp_path, Place(dry=True), 100)
    notes.check("some difference", found, 0.02)
    assert notes.wrong == ([] if fine else ["some difference"])
    assert results(tmp_path)["some difference"]["fine"] is fine


def fails(notes: Notes) -> None:
    raise ValueError("no such kernel")


def lasts(notes: Notes) -> None:
    time.sleep(30)


def adds(notes: Notes) -> None:
    notes.add("reached", True)


def test_what_fails_or_lasts_is_noted_and_the_next_section_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = (Section("broken", 5, fails), Section("endless", 1, lasts), Section("last", 5, adds))
    monkeypatch.setattr(gpu_check, "PLAN", plan)
    monkeypatch.setattr(gpu_check, "SLACK_OF_A_DRY_RUN", 1)
    assert gpu_check.main(["--dry", "--output", str(tmp_path)]) == 1
    found = results(tmp_path)
    assert found["wrong"] == ["broken", "endless"] and found["reached"]
    assert "no such kernel" in "".join(found["broken/error"])
    assert "took longer than 1 s" in "".join(found["endless/error"])
    assert "not as it should be: broken, endless" in capsys.readouterr().err


def test_sections_for_which_no_time_is_left_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "PLAN", (Section("late", 5, adds),))
    assert gpu_check.main(["--dry", "--seconds", "2", "--output", str(tmp_path)]) == 1
    found = results(tmp_path)
    assert "late/left out" in found and "reached" not in found and found["wrong"] == ["late"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_without_a_device_it_says_what_can_be_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--output", str(tmp_path / "none")])
    assert ended.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_rows_are_of_the_sizes_that_they_are_said_to_be() -> None:
    of = {kind: [row for own in rows_of(kind) for row in own] for kind in WORK}
    assert all(len(rows) == 64 for rows in of.values())
    assert {(len(row.prompt), len(row.response)) for row in of["full"]} == {(896, 128)}
    assert all(64 <= len(row.prompt) + len(row.response) <= 1024 for row in of["ragged"])
    for kind, least, most in (("shared", 100, 300), ("long", 600, 600)):
        for own in rows_of(kind):
            same = zip(*(row.prompt for row in own), strict=False)
            shared = next(i for i, tokens in enumerate(same) if len(set(tokens)) > 1)
            assert least <= shared <= most
