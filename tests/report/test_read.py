"""Reading a run folder: what is there is kept, what is damaged is named with file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedmira.errors import RunFolderError
from fedmira.report import read_run

Folders = Callable[..., Any]


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(RunFolderError) as raised:
        read_run(folder)
    return list(raised.value.problems)


def test_a_finished_run_is_read_back(run_folder: Folders) -> None:
    made = run_folder(clients=5)
    run = read_run(made.write())
    assert (run.status, run.error, run.algorithm) == ("finished", "", "mira")
    assert run.started == datetime(2026, 11, 20, 10, 44, tzinfo=UTC)
    assert [row.client for row in run.clients] == made.names
    assert [row.after_align_loss for row in run.clients] == [
        row["after_align_loss"] for row in made.client_rows
    ]
    assert [row.round for row in run.rounds] == [row["round"] for row in made.round_rows]
    assert run.summary["after_align_loss"] == made.statistics("after_align_loss")
    assert run.graph is not None
    assert list(run.graph.edges) == [
        (edge["source"], edge["target"], edge["weight"]) for edge in made.graph()["edges"]
    ]
    assert run.notes == ()


def test_empty_cells_and_columns_that_are_absent_are_none(run_folder: Folders) -> None:
    folder = run_folder(clients=2).write()
    (folder / "metrics" / "clients.csv").write_text(
        "client,base_loss,rouge_l,new_column\na,2.5,,x\n", encoding="utf-8"
    )
    (row,) = read_run(folder).clients
    assert (row.base_loss, row.scores, row.category) == (2.5, {}, "")


def test_a_run_that_failed_early_needs_neither_metrics_nor_events(run_folder: Folders) -> None:
    made = run_folder()
    made.fail_early("out of memory")
    folder = made.write()
    (folder / "events.jsonl").unlink()
    run = read_run(folder)
    assert (run.status, run.error, run.clients, run.events, run.graph) == (
        "failed",
        "out of memory",
        (),
        (),
        None,
    )


def test_a_finished_run_without_metrics_is_a_problem(run_folder: Folders) -> None:
    folder = run_folder(clients=2).write()
    (folder / "metrics" / "rounds.csv").unlink()
    (problem,) = problems_of(folder)
    assert problem.startswith(f"{folder / 'metrics' / 'rounds.csv'}: missing")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in problem


def test_all_damage_is_reported_together_with_file_and_line(run_folder: Folders) -> None:
    folder = run_folder(clients=2).write()
    (folder / "config.toml").write_text("seed = = 1\n", encoding="utf-8")
    (folder / "metrics" / "clients.csv").write_text(
        "client,train_rows\na,16\nb,many\n,4\n", encoding="utf-8"
    )
    (folder / "events.jsonl").write_text(
        '{"event": "warning", "round": 1, "message": "x"}\n{"event": \n{"event": "train", '
        '"round": 1}\n[]\n3\n'
    )
    (folder / "graph.json").write_text(
        json.dumps(
            {
                "kind": "file",
                "clients": ["a"],
                "edges": [{"source": "a", "target": "z", "weight": 1}],
            }
        )
    )
    (folder / "run.json").write_text('{"status": "done", "started": "yesterday"}')
    text = "\n".join(problems_of(folder))
    for expected in (
        "config.toml: cannot be read",
        "clients.csv line 3: train_rows is 'many'",
        "clients.csv line 4: client is empty",
        "events.jsonl line 2: cannot be read",
        "events.jsonl line 3: a 'train' event without 'client'",
        "events.jsonl line 5: holds a int",
        "graph.json: edge 0 joins 'a' and 'z'",
        "run.json: status is 'done'",
        "run.json: started is 'yesterday'",
    ):
        assert expected in text


@pytest.mark.parametrize("name", ["config.toml", "run.json"])
def test_a_needed_file_that_is_missing_is_named(run_folder: Folders, name: str) -> None:
    folder = run_folder(clients=2).write()
    (folder / name).unlink()
    assert any(problem.startswith(f"{folder / name}: missing") for problem in problems_of(folder))


def test_an_empty_run_json_and_a_file_that_is_not_text_are_problems(run_folder: Folders) -> None:
    folder = run_folder(clients=2).write()
    (folder / "run.json").write_text("")
    (folder / "graph.json").write_bytes(b"\xff\xfe\x00")
    text = "\n".join(problems_of(folder))
    assert "run.json: empty" in text
    assert "graph.json: not UTF-8 text at byte 0" in text


def test_a_line_cut_off_by_a_crash_is_left_out_and_noted(run_folder: Folders) -> None:
    folder = run_folder(clients=2).write()
    whole = read_run(folder)
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "train", "rou')
    run = read_run(folder)
    assert run.events == whole.events
    assert run.notes == (
        f"events.jsonl line {len(whole.events) + 1}: cut off while it was written; left out",
    )


def test_numbers_that_are_not_finite_are_left_out_and_noted(run_folder: Folders) -> None:
    made = run_folder(clients=2)
    made.client_rows[0]["rouge_l"] = float("nan")
    made.events.append(
        {"event": "train", "round": 21, "client": made.names[0], "loss": float("inf")}
    )
    run = read_run(made.write())
    assert run.clients[0].figure("rouge_l") is None
    assert max(number for number, _ in run.series("train", "loss")[made.names[0]]) == 20
    assert "rouge_l" not in {name for name, figure in run.summary.items() if "mean" in figure}
    assert any("rouge_l is nan" in note for note in run.notes)
    assert any("loss is inf" in note for note in run.notes)


def test_of_two_events_of_a_round_the_later_counts(run_folder: Folders) -> None:
    made = run_folder(clients=2)
    made.events += [
        {"event": "train", "round": 20, "client": made.names[0], "loss": value}
        for value in (9.0, 7.0)
    ]
    run = read_run(made.write())
    points = run.series("train", "loss")[made.names[0]]
    assert points[-1] == (20, 7.0)
    assert [number for number, _ in points] == list(range(1, 21))
