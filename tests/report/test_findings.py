"""Numbers derived from a run: headline, gains and harms, settings that differ, traffic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmira.report import read_run, summary_rows
from fedmira.report.findings import (
    Change,
    Kept,
    changed_settings,
    changes_by_alignment,
    curve_of_test_loss,
    flat_settings,
    pull_kept,
    traffic,
)
from fedmira.runs.pages import default_settings

Folders = Callable[..., Any]


def test_summary_rows_keep_reading_order_and_leave_out_what_was_not_measured(
    run_folder: Folders,
) -> None:
    made = run_folder(clients=4)
    for row in made.client_rows:
        row["exact_match"] = float("nan")
    rows = summary_rows(read_run(made.write()))
    assert [row.name for row in rows] == [
        "base_loss",
        "before_align_loss",
        "after_align_loss",
        "rouge_l",
        "rouge_l_package",
    ]
    assert [row.title for row in rows][-2:] == ["Rouge-L (rouge_score)", "Rouge-L (rouge package)"]
    assert rows[2].worst_tenth == made.statistics("after_align_loss")["worst_tenth"]


@pytest.mark.parametrize(
    ("after", "verdict"),
    [(1.9, "gained"), (1.97, "unchanged"), (2.03, "unchanged"), (2.1, "harmed")],
)
def test_a_change_counts_from_two_percent(after: float, verdict: str) -> None:
    assert Change("a", 2.0, after).verdict == verdict
    assert Change("a", 2.0, after).relative == pytest.approx(after / 2 - 1)


def test_changes_are_sorted_from_gain_to_harm_and_absent_where_nothing_moved(
    run_folder: Folders,
) -> None:
    made = run_folder("mira", clients=8)
    changes = changes_by_alignment(read_run(made.write()))
    expected = sorted(
        row["after_align_loss"] / row["before_align_loss"] - 1 for row in made.client_rows
    )
    assert [change.relative for change in changes] == pytest.approx(expected)
    assert (
        changes_by_alignment(read_run(run_folder("alone", clients=8, algorithm="local").write()))
        == []
    )


def test_what_clients_kept_of_the_pull_is_counted_at_their_last_evaluation_only(
    run_folder: Folders,
) -> None:
    made = run_folder("mira", clients=6)
    evaluated = [event for event in made.events if event["event"] == "evaluate"]
    for event in evaluated:
        event["pull_kept"] = 1.0
    last = [
        event for event in evaluated if event["round"] == max(event["round"] for event in evaluated)
    ]
    for event, share in zip(last, (0.0, 0.0, 0.5, 1.0, 0.0, None), strict=True):
        event["pull_kept"] = share
    assert pull_kept(read_run(made.write())) == Kept(nothing=3, some=1, everything=1), (
        "who had no choice does not count"
    )
    assert pull_kept(read_run(run_folder("without", clients=6).write())) is None


def _changed(folder: Path) -> list[tuple[str, Any, Any]]:
    run = read_run(folder)
    return changed_settings(run, default_settings(run.algorithm))


def test_only_settings_that_differ_from_the_defaults_are_listed(run_folder: Folders) -> None:
    assert _changed(run_folder("mira", clients=2).write()) == [
        ("algorithm.name", "mira", "two-level"),
        ("local.steps", 7, 5),
    ]
    local = _changed(run_folder("alone", clients=2, algorithm="local").write())
    assert local == [("algorithm.name", "local", "two-level"), ("local.steps", 7, 5)]


def test_settings_of_an_algorithm_this_version_does_not_know_are_all_listed(
    run_folder: Folders,
) -> None:
    folder = run_folder(clients=2).write()
    (folder / "config.toml").write_text(
        '[algorithm]\nname = "newer"\nstrength = 2\n', encoding="utf-8"
    )
    assert _changed(folder) == [
        ("algorithm.name", "newer", "two-level"),
        ("algorithm.strength", 2, None),
    ]


def test_settings_flatten_to_dotted_keys() -> None:
    assert flat_settings({"a": {"b": {"c": 1}, "d": []}, "e": {}}) == {
        "a.b.c": 1,
        "a.d": [],
        "e": {},
    }


def test_traffic_is_the_sum_over_rounds_in_mib_and_absent_where_nothing_travels(
    run_folder: Folders,
) -> None:
    found = traffic(read_run(run_folder("mira", clients=3).write()))
    adapter = 4 * 43_008 / 2**20
    assert found is not None
    assert found.up_mib == pytest.approx(20 * 3 * adapter)
    assert found.down_mib_each == pytest.approx(adapter)
    assert traffic(read_run(run_folder("alone", clients=3, algorithm="local").write())) is None


def test_the_curve_of_test_loss_starts_at_the_base_model(run_folder: Folders) -> None:
    made = run_folder(clients=3)
    curve = curve_of_test_loss(read_run(made.write()))
    assert [number for number, _ in curve] == [0, 5, 10, 15, 20]
    assert curve[0][1] == pytest.approx(made.statistics("base_loss")["mean"])
    assert curve[-1][1] == pytest.approx(made.statistics("after_align_loss")["mean"])
