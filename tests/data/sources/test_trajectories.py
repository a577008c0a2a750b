"""Trajectories as rows of a planner and an executor, whole on one side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedmira.config import DataSettings
from fedmira.data import Example, read_rows
from fedmira.data.reading import read_one
from fedmira.data.sources.trajectories import (
    EXECUTOR,
    HISTORY,
    PLANNER,
    Step,
    Trajectory,
    read,
    rows_of_trajectory,
)
from fedmira.errors import DataError


def step(subgoal: Any, number: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "action": f"do {number}",
        "observation": f"saw {number}",
        "reward": 1,
        "subgoal": subgoal,
        **changes,
    }


def trajectory(name: str, goals: str = "aabb") -> dict[str, Any]:
    return {
        "task": f"boil {name}",
        "steps": [step(goal, number) for number, goal in enumerate(goals)],
    }


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def options(path: Path, **keys: Any) -> DataSettings:
    return DataSettings(source="trajectories", path=str(path), **keys)


def problems_of(path: Path, **keys: Any) -> str:
    with pytest.raises(DataError) as raised:
        read(options(path, **keys), 0)
    return "\n".join(raised.value.problems)


def made(goals: str) -> Trajectory:
    return Trajectory("boil", tuple(Step(g, f"do {i}", f"saw {i}", 1) for i, g in enumerate(goals)))


def completed(row: Example) -> str:
    (line,) = [each for each in row.input.splitlines() if each.startswith("Completed")]
    return line.removeprefix("Completed sub-goals: ")


def test_four_steps_of_two_sub_goals_are_four_actions_and_two_plans() -> None:
    planned = rows_of_trajectory(made("aabb"), PLANNER)
    assert [(completed(row), row.output) for row in planned] == [("none", "a"), ("a", "b")]
    done = rows_of_trajectory(made("aabb"), EXECUTOR)
    assert [row.output for row in done] == ["do 0", "do 1", "do 2", "do 3"]
    assert [completed(row) for row in done] == ["none", "none", "a", "a"]


def test_a_sub_goal_that_comes_again_is_planned_again() -> None:
    planned = rows_of_trajectory(made("aba"), PLANNER)
    assert [(completed(row), row.output) for row in planned] == [
        ("none", "a"),
        ("a", "b"),
        ("a; b", "a"),
    ]


def test_a_row_tells_at_most_the_last_ten_steps() -> None:
    rows = rows_of_trajectory(made("a" * 14), EXECUTOR)
    told = [[line for line in row.input.splitlines() if line.startswith("- ")] for row in rows]
    assert [len(lines) for lines in told] == [min(number, HISTORY) for number in range(14)]
    assert [line.split(" | ")[0] for line in told[-1]] == [f"- do {i}" for i in range(3, 13)]


def test_the_bytes_of_a_row_stay_what_they_are() -> None:
    steps = (
        Step("find a pot", "go to kitchen", "You are in the kitchen.", 0, "A hall.", "nothing"),
        Step("find a pot", "take pot", "", 0.5, "A kitchen.", "nothing"),
        Step("boil water", "fill pot", "The pot is full.", 1),
    )
    planned = rows_of_trajectory(Trajectory("Boil water.", steps), PLANNER)[1]
    assert planned.instruction == "Name the next sub-goal of the task."
    assert planned.output == "boil water"
    assert planned.input == (
        "Task: Boil water.\n"
        "Time: 2; score: 0.5\n"
        "Completed sub-goals: find a pot\n"
        "Last steps:\n"
        "- go to kitchen | reward 0 | You are in the kitchen.\n"
        "- take pot | reward 0.5 | nothing seen"
    )
    first = rows_of_trajectory(Trajectory("Boil water.", steps), EXECUTOR)[0]
    assert first.instruction == "Name the next action towards the current sub-goal."
    assert first.output == "go to kitchen"
    assert first.input == (
        "Task: Boil water.\n"
        "Time: 0; score: 0\n"
        "Completed sub-goals: none\n"
        "Current sub-goal: find a pot\n"
        "Last steps: none\n"
        "Environment: A hall.\n"
        "Inventory: nothing"
    )


@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_no_trajectory_stands_on_two_sides_of_either_client(
    validation: float, tmp_path: Path
) -> None:
    path = write(tmp_path / "lab.jsonl", [trajectory(f"t{i}") for i in range(10)])
    keys = {"train_fraction": 0.6, "validation_fraction": validation}
    rows = read_rows(options(path, **keys), 3)
    sides: dict[str, set[str]] = {}
    for split in rows.splits:
        for side in ("train", "validation", "test"):
            tasks = {row.input.splitlines()[0] for row in getattr(split, side)}
            sides.setdefault(side, set()).update(tasks)
    # Of both clients together: what one trains on, the other does not test on.
    assert not sides["train"] & sides["test"]
    assert not sides["validation"] & (sides["train"] | sides["test"])
    assert len(sides["test"]) == (4 if validation == 0 else 2)
    assert len(sides["validation"]) == round(10 * validation)
    for split in rows.splits:
        assert {row.input.splitlines()[0] for row in split.test} == sides["test"]


def test_both_are_two_clients_of_one_category_and_one_is_one(tmp_path: Path) -> None:
    path = write(tmp_path / "lab.jsonl", [trajectory(f"t{i}") for i in range(5)])
    found = {
        emit: [(task.name, task.category) for task in read(options(path, emit=emit), 0).tasks]
        for emit in ("planner", "executor", "both")
    }
    planner, executor = ("lab-planner", "lab"), ("lab-executor", "lab")
    assert found == {"planner": [planner], "executor": [executor], "both": [planner, executor]}


def test_each_file_of_a_folder_is_a_pair_whose_sides_do_not_depend_on_the_others(
    tmp_path: Path,
) -> None:
    rows = [trajectory(f"t{i}") for i in range(8)]
    alone = read(options(write(tmp_path / "lab.jsonl", rows)), 5).tasks
    folder = tmp_path / "all"
    folder.mkdir()
    write(folder / "kitchen.jsonl", [{**row, "category": "home"} for row in rows])
    write(folder / "lab.jsonl", rows)
    tasks = read(options(folder), 5).tasks
    assert [(task.name, task.category) for task in tasks] == [
        ("kitchen-planner", "home"),
        ("kitchen-executor", "home"),
        ("lab-planner", "lab"),
        ("lab-executor", "lab"),
    ]
    assert tasks[2:] == alone


def test_a_share_of_the_trajectories_is_whole_trajectories(tmp_path: Path) -> None:
    path = write(tmp_path / "lab.jsonl", [trajectory(f"t{i}") for i in range(10)])
    (task,) = read(options(path, emit="executor", sample_fraction=0.5), 0).tasks
    rows = [*task.examples, *(task.test or ())]
    assert len(rows) == 5 * 4 and len({row.input.splitlines()[0] for row in rows}) == 5


def test_one_client_by_itself_is_found_by_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "lab.jsonl", [trajectory(f"t{i}") for i in range(5)])
    client, _, _ = read_one(options(path), 0, "lab-planner")
    assert client.client_id == "lab-planner"
    assert {row.output for row in client.examples} == {"a", "b"}


@pytest.mark.parametrize("lacking", [None, "", "  ", 7])
def test_a_step_without_a_sub_goal_is_an_error_with_its_line(lacking: Any, tmp_path: Path) -> None:
    rows = [trajectory(f"t{i}") for i in range(3)]
    rows[1]["steps"][2]["subgoal"] = lacking
    path = write(tmp_path / "lab.jsonl", rows)
    assert f"{path}:2 step 3: has no sub-goal" in problems_of(path)


def test_everything_else_that_is_wrong_is_told_together_with_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "lab.jsonl",
        [
            {"steps": [step("a")]},
            {"task": "t"},
            {"task": "t", "steps": []},
            {"task": "t", "steps": ["go"]},
            {"task": "t", "steps": [step("a", reward=None)]},
            {"task": "t", "steps": [step("a", reward=float("nan"))]},
            {"task": "t", "steps": [step("a", reward=True)]},
            {"task": "t", "steps": [step("a", action=" ")]},
            {"task": "t", "steps": [step("a", observation=None)]},
        ],
    )
    told = problems_of(path)
    for line, what in enumerate(
        (
            "missing key 'task'",
            "missing key 'steps'",
            "'steps' is empty",
            "must be an object",
            "missing key 'reward'",
            "'reward' is 'nan'",
            "'reward' is 'True'",
            "'action' is empty",
            "missing key 'observation'",
        ),
        start=1,
    ):
        assert any(what in each and f":{line}" in each for each in told.splitlines()), what


def test_too_few_trajectories_are_refused_with_how_many_are_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "lab.jsonl", [trajectory("t")])
    assert "at least 2 trajectories are needed" in problems_of(path)


def test_settings_that_would_part_steps_or_are_not_read_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "lab.jsonl", [trajectory(f"t{i}") for i in range(3)])
    assert "needs 'task'" in problems_of(path, partition="category")
    assert "does not read them" in problems_of(path, instruction="Go.")
    assert "does not read them" in problems_of(path, columns={"output": "action"})
    write(tmp_path / "test.jsonl", [trajectory("t")])
    assert "join the parts in one file" in problems_of(tmp_path)


def test_what_is_not_read_and_what_is_left_out_is_told(tmp_path: Path) -> None:
    rows = [trajectory(f"t{i}") for i in range(4)]
    rows[0] |= {"comment": "first"}
    rows[1]["steps"][0]["advantage"] = 0.5
    path = write(tmp_path / "lab.jsonl", [*rows, rows[3]])
    found = read(options(path), 0)
    assert found.skipped == (f"{path}: 1 copies of other trajectories",)
    assert found.notes == (
        "not read, their text reaches no model: comment (1 times), step advantage (1 times)",
    )
    assert read(options(path, ignore=["comment", "advantage"]), 0).notes == ()
