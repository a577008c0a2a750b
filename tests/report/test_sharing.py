"""What sharing gains: a method minus its own control, beside its distance to local training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmira.report import write_comparison

Folders = Callable[..., Any]


def test_a_method_is_held_against_its_control(run_folder: Folders, tmp_path: Path) -> None:
    """Local 2, control 1.9, method 1.8: half of the gain is shared; one client is worse by 5 %."""
    made = {
        name: {
            seed: run_folder(f"{name}-{seed}", clients=4, algorithm=algorithm) for seed in (0, 1)
        }
        for name, algorithm in (("local", "local"), ("mira", "mira"), ("mira-alone", "mira"))
    }
    levels = {"local": (2.0,) * 4, "mira-alone": (1.9,) * 4, "mira": (1.7, 1.7, 1.805, 1.995)}
    for name, runs in made.items():
        for run in runs.values():
            for row, loss in zip(run.client_rows, levels[name], strict=True):
                row["after_align_loss"], row["best_test_loss"] = loss, loss - 0.5
    folders = {
        name: {seed: run.write() for seed, run in runs.items()} for name, runs in made.items()
    }
    figures = write_comparison(folders, tmp_path / "out", controls={"mira": "mira-alone"})
    row = next(row for row in figures.method_rows if row["method"] == "mira")
    assert row["control"] == "mira-alone"
    assert row["sharing_gain"] == pytest.approx(sum(levels["mira"]) / 4 - 1.9)
    assert row["sharing_gain_low"] <= row["sharing_gain"] <= row["sharing_gain_high"]
    assert (row["below_control"], row["above_control"]) == (3, 1)
    assert row["best_sharing_gain"] == pytest.approx(row["sharing_gain"])
    others = [other for other in figures.method_rows if other["method"] != "mira"]
    assert all(other["control"] is None and other["sharing_gain"] is None for other in others)
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    for shown in (page, text):
        assert "What sharing gains" in shown and "3 / 1 of 4" in shown
    document = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert "shares nothing" in document["sharing_rule"]


def test_without_a_control_nothing_is_said_of_sharing(run_folder: Folders, tmp_path: Path) -> None:
    made = {name: {0: run_folder(name, clients=3, algorithm=name)} for name in ("local", "mira")}
    folders = {name: {0: runs[0].write()} for name, runs in made.items()}
    figures = write_comparison(folders, tmp_path / "out", controls={"mira": "failed-control"})
    assert "sharing_gain" not in figures.method_rows[0]
    assert "What sharing gains" not in (tmp_path / "out" / "comparison.md").read_text("utf-8")
