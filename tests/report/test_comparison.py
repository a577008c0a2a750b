"""Runs side by side: who is better and worse off than alone, coloured by distance from the best of the row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmira.errors import RunFolderError
from fedmira.report import read_run, write_comparison, write_report
from fedmira.report.comparison import heat, standing

Folders = Callable[..., Any]


def three_methods(run_folder: Folders) -> dict[str, Any]:
    return {
        title: run_folder(name, clients=8, algorithm=name) for title, name in (("Local", "local"), ("FedIT", "fedavg"), ("MIRA", "mira"))
    }


def test_the_page_holds_every_client_method_and_mean(run_folder: Folders, tmp_path: Path) -> None:
    made = three_methods(run_folder)
    runs = {title: folder.write() for title, folder in made.items()}
    write_report(runs["MIRA"])
    output = tmp_path / "deep" / "comparison.html"
    assert write_comparison(runs, output) == output
    page = output.read_text(encoding="utf-8")
    for folder in made.values():
        assert f"{folder.statistics('after_align_loss')['mean']:.3f}" in page
        assert f"{folder.statistics('after_align_loss')['worst_tenth']:.3f}" in page
        for row in folder.client_rows:
            assert f"{row['after_align_loss']:.3f}" in page
    assert '<a href="../mira/report.html">MIRA</a>' in page
    assert page.count("<a href=") == 1  # the other runs have no report
    assert "algorithm.name" in page


def test_better_and_worse_count_clients_beyond_two_percent_of_local(run_folder: Folders) -> None:
    made = three_methods(run_folder)
    for factor, row, alone in zip(
        (0.9, 0.97, 0.985, 1.0, 1.015, 1.03, 1.1, 1.2), made["MIRA"].client_rows, made["Local"].client_rows, strict=True
    ):
        row["after_align_loss"] = factor * alone["after_align_loss"]
    found = standing(read_run(made["MIRA"].write()), read_run(made["Local"].write()))
    assert (found.better, found.worse, found.measured) == (2, 3, 8)


@pytest.mark.parametrize(("excess", "expected"), [(0, 0), (0.01, 1), (0.04, 2), (0.09, 3), (0.2, 4), (0.3, 5)])
def test_heat_grows_with_the_excess_over_the_best(excess: float, expected: int) -> None:
    assert heat(2 * (1 + excess), 2.0) == expected


def test_runs_with_different_clients_are_said_to_be_incomparable(run_folder: Folders, tmp_path: Path) -> None:
    runs = {"one": run_folder("one", clients=3).write(), "two": run_folder("two", clients=4).write()}
    page = write_comparison(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "The runs do not have the same clients." in page
    assert "better than" not in page  # no run trained alone


def test_a_failed_run_is_named_and_its_cells_are_empty(run_folder: Folders, tmp_path: Path) -> None:
    failed = run_folder("failed", clients=4)
    failed.fail_early("out of memory")
    runs = {"good": run_folder("good", clients=4).write(), "bad": failed.write()}
    page = write_comparison(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "bad: this run failed." in page
    assert "out of memory" in page
    assert "nan" not in page.lower().replace("finance", "")


def test_titles_are_escaped(run_folder: Folders, tmp_path: Path) -> None:
    runs = {"<script>x</script>": run_folder("a b#c", clients=2).write()}
    write_report(runs["<script>x</script>"])
    page = write_comparison(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<script>") == 1
    assert 'href="a%20b%23c/report.html"' in page


def test_damage_of_all_folders_is_reported_together(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError) as raised:
        write_comparison({"one": tmp_path / "one", "two": tmp_path / "two"}, tmp_path / "page.html")
    assert len(raised.value.problems) == 2
    with pytest.raises(RunFolderError, match="no run to compare"):
        write_comparison({}, tmp_path / "page.html")
