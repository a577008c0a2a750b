"""Rounds and seconds to a target loss are read from what a run evaluated.

What was not reached is said to be so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmira.errors import ConfigError
from fedmira.report import reached, read_run, write_comparison

Folders = Callable[..., Any]


def losses(folder: Any, by_round: dict[int, float]) -> Any:
    """Rounds that were evaluated, with these mean losses.

    Each round took round-number seconds and a tenth of that to combine.
    """
    for row in folder.round_rows:
        row["test_loss"] = by_round.get(row["round"], "")
        row["train_seconds"] = row["round"]
    for event in folder.events:
        if event["event"] == "round":
            event["combine_seconds"] = event["round"] / 10
    return folder


def test_the_first_evaluated_round_at_the_target_counts_and_time_is_training_and_combining(
    run_folder: Folders,
) -> None:
    run = read_run(losses(run_folder(clients=2), {2: 3.0, 5: 2.0, 10: 2.5, 15: 1.0}).write())
    at_five = reached(run, 2.0)
    assert (
        at_five is not None
        and at_five.rounds == 5
        and at_five.seconds == pytest.approx(1.1 * (1 + 2 + 3 + 4 + 5))
    )
    later = reached(run, 1.5)
    assert (
        later is not None
        and later.rounds == 15
        and later.seconds == pytest.approx(1.1 * sum(range(1, 16)))
    )
    assert reached(run, 0.99) is None


def test_seconds_are_left_out_where_a_round_has_none(run_folder: Folders) -> None:
    folder = losses(run_folder(clients=2), {5: 2.0})
    folder.round_rows[2]["train_seconds"] = ""
    found = reached(read_run(folder.write()), 2.0)
    assert found is not None and (found.rounds, found.seconds) == (5, None)


def test_a_method_is_there_when_all_its_seeds_are(run_folder: Folders, tmp_path: Path) -> None:
    paths = {
        "soon": {0: {5: 2.0}, 1: {5: 3.0, 10: 2.0}},
        "half": {0: {5: 2.0}, 1: {5: 3.0}},
        "never": {0: {5: 3.0}, 1: {5: 3.0}},
    }
    written = {
        name: {
            seed: losses(run_folder(f"{name}-{seed}", clients=2), by_round).write()
            for seed, by_round in of_seed.items()
        }
        for name, of_seed in paths.items()
    }
    figures = write_comparison(written, tmp_path / "all", target=2.0)
    rows = {row["method"]: row for row in figures.method_rows}
    assert (rows["soon"]["rounds_to_target"], rows["soon"]["seeds_to_target"]) == (7.5, 2)
    assert rows["soon"]["seconds_to_target"] == pytest.approx(1.1 * (15 + 55) / 2)
    assert [rows[name]["rounds_to_target"] for name in ("half", "never")] == [None, None]
    assert [rows[name]["seeds_to_target"] for name in ("half", "never")] == [1, 0]
    text = (tmp_path / "all" / "comparison.md").read_text(encoding="utf-8")
    assert (
        "## To a test loss of 2" in text
        and "reached by 1 of 2 seeds" in text
        and "not reached" in text
    )
    page = (tmp_path / "all" / "comparison.html").read_text(encoding="utf-8")
    assert "To a test loss of 2.0" in page and "reached by 1 of 2 seeds" in page
    document = json.loads((tmp_path / "all" / "comparison.json").read_text(encoding="utf-8"))
    assert document["target_loss"] == 2.0
    assert [run["rounds_to_target"] for run in document["runs"]] == [5, 10, 5, None, None, None]


def test_without_a_target_nothing_is_said_of_one(run_folder: Folders, tmp_path: Path) -> None:
    figures = write_comparison({"mira": {0: run_folder(clients=2).write()}}, tmp_path / "all")
    assert not any(
        "target" in key
        for row in (*figures.method_rows, *figures.run_rows, figures.document())
        for key in row
    )
    assert "To a test loss" not in (tmp_path / "all" / "comparison.html").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan"), float("inf")])
def test_a_target_that_no_loss_can_meet_is_refused(
    target: float, run_folder: Folders, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="must be a finite number above 0"):
        write_comparison(
            {"mira": {0: run_folder(clients=2).write()}}, tmp_path / "all", target=target
        )
