"""experiments/comparison/summarise.py says what the package's own tables say.

Of the runs that have finished.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmira.report import read_run
from fedmira.report.comparison_figures import compare_runs

SCRIPT = Path(__file__).parents[2] / "experiments" / "comparison" / "summarise.py"

Folders = Callable[..., Any]


def tables_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[list[list[str]]]:
    """Of each table its rows, of each row its cells."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    parts = capsys.readouterr().out.strip().split("\n\n")
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
        for part in parts
        if part.startswith("|")
    ]


def test_both_read_outs_are_paired_and_counted_as_in_the_tables(
    run_folder: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = {
        name: {seed: run_folder(f"{name}-seed{seed}", clients=8, algorithm=name) for seed in (0, 1)}
        for name in ("local", "mira")
    }
    for row in made["mira"][1].client_rows:
        row["after_align_loss"] *= 1.001
    for seed in (0, 1):  # at their best rounds, two clients gain a tenth and the others nothing
        for k, (row, alone) in enumerate(
            zip(made["mira"][seed].client_rows, made["local"][seed].client_rows, strict=True)
        ):
            row["best_test_loss"] = alone["best_test_loss"] * (0.9 if k < 2 else 1.0)
    late = run_folder("mira-seed2", clients=8)
    late.status = "running"
    late.write()
    figures = compare_runs(
        {
            name: {seed: read_run(run.write()) for seed, run in runs.items()}
            for name, runs in made.items()
        }
    )

    last, best = tables_of(tmp_path, monkeypatch, capsys)
    assert last[0] == [
        "last round",
        "seeds",
        "mean test loss",
        "vs local (95% interval)",
        "better",
        "equal",
        "worse",
    ]
    expected = figures.method_rows[1]
    cells = next(row for row in last if row[0] == "mira")
    ends = [expected[f"difference_to_local{end}"] for end in ("", "_low", "_high")]
    counts = [expected[f"{key}_local"] for key in ("better_than", "equal_to", "worse_than")]
    assert cells[1:4] == [
        "2",
        f"{expected['test_loss']:.3f}",
        "{:+.3f} ({:+.3f} to {:+.3f})".format(*ends),
    ]
    assert cells[4:] == [f"{count} ({count / 8:.0%})" for count in counts] and sum(counts) == 8
    assert next(row for row in best if row[0] == "mira")[4:] == ["2 (25%)", "6 (75%)", "0 (0%)"]
    assert [row[0] for row in best[2:]] == ["mira", "local"], "the lowest mean first"


def test_a_method_is_held_against_local_on_the_seeds_that_both_have(
    run_folder: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for seed in (0, 1, 2):
        run_folder(f"local-seed{seed}", clients=4, algorithm="local").write()
    only = run_folder("mira-seed1", clients=4)
    only.write()
    last, _ = tables_of(tmp_path, monkeypatch, capsys)
    assert {row[0]: row[1] for row in last[2:]} == {"local": "3", "mira": "1"}
    mean = sum(row["after_align_loss"] for row in only.client_rows) / 4
    assert next(row for row in last if row[0] == "mira")[2] == f"{mean:.3f}"


def test_without_a_run_of_local_it_says_so(
    run_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder("mira-seed0", clients=4).write()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path)])
    with pytest.raises(SystemExit, match="no finished run of 'local'"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
