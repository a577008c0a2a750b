"""Natural Instructions by FedKSeed's rules, on tiny files and on the real task files.

The tiny files lie at the boundaries.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedmira.config import DataSettings
from fedmira.data.sources.natural_instructions import read
from fedmira.errors import DataError


def instances(count: int, length: int = 5) -> list[dict[str, Any]]:
    return [
        {"id": str(i), "input": f"{i:0{length}d}", "output": [f"first {i}", "second"]}
        for i in range(count)
    ]


def write_task(folder: Path, name: str, rows: list[Any], **changes: Any) -> Path:
    content = {
        "Definition": ["Do it.", "Or so."],
        "Categories": ["Kind", "Other"],
        "Instances": rows,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def options(path: Path, **keys: Any) -> DataSettings:
    return DataSettings(source="natural-instructions", path=str(path), **keys)


def problems_of(settings: DataSettings) -> tuple[str, ...]:
    with pytest.raises(DataError) as error:
        read(settings, 0)
    return error.value.problems


def test_first_definition_first_output_first_category(tmp_path: Path) -> None:
    path = write_task(tmp_path, "task001_a", instances(20))
    (task,) = read(options(tmp_path), 0).tasks
    row = task.examples[3]
    assert (task.name, task.category) == ("task001_a", "Kind")
    assert (row.instruction, row.input, row.output, row.where) == (
        "Do it.",
        "00003",
        "first 3",
        f"{path}, instance 4",
    )


def test_an_input_of_1023_characters_stays_and_one_of_1024_goes(tmp_path: Path) -> None:
    write_task(tmp_path, "task001_a", instances(20, 1023) + instances(7, 1024))
    (task,) = read(options(tmp_path), 0).tasks
    assert len(task.examples) == 20


def test_a_row_that_is_left_out_for_its_length_may_lack_a_response(tmp_path: Path) -> None:
    write_task(tmp_path, "task001_a", [*instances(20), {"input": "x" * 1024, "output": [""]}])
    assert len(read(options(tmp_path), 0).tasks[0].examples) == 20


def test_19_rows_are_skipped_and_20_stay(tmp_path: Path) -> None:
    write_task(tmp_path, "task001_a", instances(19) + instances(5, 2000))
    write_task(tmp_path, "task002_b", instances(20))
    reading = read(options(tmp_path), 0)
    assert [task.name for task in reading.tasks] == ["task002_b"]
    assert reading.skipped == (
        "task001_a: 19 rows with fewer than 1024 characters of input; at least 20 are needed",
    )


def test_a_larger_min_rows_holds_before_and_after_sampling(tmp_path: Path) -> None:
    write_task(tmp_path, "task001_a", instances(24))
    write_task(tmp_path, "task002_b", instances(30))
    reading = read(options(tmp_path, min_rows=25, sample_fraction=0.5), 0)
    assert reading.tasks == ()
    assert reading.skipped == (
        "task001_a: 24 rows with fewer than 1024 characters of input; at least 25 are needed",
        "task002_b: 15 rows after data.sample_fraction; data.min_rows is 25",
    )


@pytest.mark.parametrize(("count", "kept"), [(20, 4), (24, 4), (25, 5), (29, 5), (30, 6)])
def test_a_fifth_is_a_floor_and_drawn_without_replacement(
    tmp_path: Path, count: int, kept: int
) -> None:
    write_task(tmp_path, "task001_a", instances(count))
    (task,) = read(options(tmp_path, sample_fraction=0.2), 42).tasks
    assert len(task.examples) == len(set(task.examples)) == kept


@pytest.mark.parametrize(
    ("count", "kept"), [(20, 20), (21, 20), (1049, 20), (1050, 21), (1099, 21), (1100, 22)]
)
def test_of_an_unseen_task_two_percent_are_drawn_and_at_least_twenty(
    tmp_path: Path, count: int, kept: int
) -> None:
    """max(20, int(0.02 n)): FedKSeed's rule for the tasks of the official test list."""
    write_task(tmp_path, "task001_a", instances(count))
    (task,) = read(options(tmp_path, sample_fraction=0.02, sample_least=20), 42).tasks
    assert len(task.examples) == len(set(task.examples)) == kept


def test_the_draw_of_a_task_depends_on_the_seed_and_its_name_only(tmp_path: Path) -> None:
    write_task(tmp_path / "one", "task002_b", instances(100))
    write_task(tmp_path / "two", "task001_a", instances(50))
    write_task(tmp_path / "two", "task002_b", instances(100))
    keys = {"sample_fraction": 0.2}
    alone, beside = (
        read(options(tmp_path / name, **keys), 1).tasks[-1].examples for name in ("one", "two")
    )
    assert alone == beside
    assert alone != read(options(tmp_path / "one", **keys), 2).tasks[-1].examples


def test_tasks_come_by_number_and_a_tasks_folder_is_found(tmp_path: Path) -> None:
    for name in ("task1000_x", "task20_y", "task3_z"):
        write_task(tmp_path / "tasks", name, instances(20))
    assert [task.name for task in read(options(tmp_path), 0).tasks] == [
        "task3_z",
        "task20_y",
        "task1000_x",
    ]


def test_the_official_list_is_used_and_what_it_misses_is_counted(tmp_path: Path) -> None:
    for name in ("task1_a", "task2_b", "task3_c"):
        write_task(tmp_path / "tasks", name, instances(20))
    lists = tmp_path / "splits" / "default"
    lists.mkdir(parents=True)
    (lists / "train_tasks.txt").write_text("task3_c\ntask1_a\ntask9_not_here\n", encoding="utf-8")
    for path in (tmp_path, tmp_path / "tasks"):
        reading = read(options(path), 0)
        assert [task.name for task in reading.tasks] == ["task3_c", "task1_a"]
        assert reading.skipped == (
            f"{lists / 'train_tasks.txt'}: 1 of its 3 tasks have no file in {tmp_path / 'tasks'}",
        )


def test_a_list_of_ones_own_goes_before_the_official_one(tmp_path: Path) -> None:
    for name in ("task1_a", "task2_b"):
        write_task(tmp_path, name, instances(20))
    (tmp_path / "mine.txt").write_text("task2_b.json\n\n", encoding="utf-8")
    assert [
        task.name
        for task in read(options(tmp_path, split_list=str(tmp_path / "mine.txt")), 0).tasks
    ] == ["task2_b"]
    (tmp_path / "mine.txt").write_text("task2_b\ntask2_b\ntask7_no\ntask8_no\n", encoding="utf-8")
    problems = problems_of(options(tmp_path, split_list=str(tmp_path / "mine.txt")))
    assert [problem.split(": ")[1] for problem in problems] == [
        "task 'task7_no' has no file; looked for task7_no.json",
        "task 'task8_no' has no file; looked for task8_no.json",
        "task 'task2_b' is listed 2 times; list it once",
    ]


def test_reading_ends_when_the_wanted_clients_are_found(tmp_path: Path) -> None:
    write_task(tmp_path, "task1_a", instances(3))
    write_task(tmp_path, "task2_b", instances(20))
    (tmp_path / "task3_c.json").write_text("broken", encoding="utf-8")
    reading = read(options(tmp_path, clients=1), 0)
    assert [task.name for task in reading.tasks] == ["task2_b"] and len(reading.skipped) == 1


def test_all_problems_of_all_files_come_together(tmp_path: Path) -> None:
    write_task(
        tmp_path,
        "task1_a",
        [
            {"input": "x"},
            {"output": ["y"]},
            {"input": "x", "output": []},
            {"input": "x", "output": [" "]},
            7,
        ],
    )
    write_task(tmp_path, "task2_b", instances(20), Definition=[])
    (tmp_path / "task3_c.json").write_text(
        '{\n"Definition": ["a"],\n"Categories" ["b"]}', encoding="utf-8"
    )
    (tmp_path / "task4_d.json").write_bytes('{"Definition": ["caf\u00e9"]}'.encode("latin-1"))
    (tmp_path / "task5_e.json").write_text(
        '{"Definition": "d", "Categories": "c"}', encoding="utf-8"
    )
    (tmp_path / "task6_f.json").write_text("[1]", encoding="utf-8")
    assert problems_of(options(tmp_path)) == (
        f"{tmp_path}/task1_a.json, instance 1: missing key 'output', found input",
        f"{tmp_path}/task1_a.json, instance 2: missing key 'input', found output",
        f"{tmp_path}/task1_a.json, instance 3: 'output' is an empty list",
        f"{tmp_path}/task1_a.json, instance 4: empty response; a row needs text to learn",
        f"{tmp_path}/task1_a.json, instance 5: is of type int; must be an object with "
        "'input' and 'output'",
        f"{tmp_path}/task2_b.json: 'Definition' is an empty list",
        f"{tmp_path}/task3_c.json:3: broken JSON: Expecting ':' delimiter (column 14)",
        f"{tmp_path}/task4_d.json: not UTF-8 at byte 20; save the file as UTF-8",
        f"{tmp_path}/task5_e.json: missing key 'Instances', found Definition, Categories",
        f"{tmp_path}/task6_f.json:1: holds a list; one JSON object is expected",
    )


def test_more_than_twenty_problems_are_counted(tmp_path: Path) -> None:
    write_task(
        tmp_path, "task1_a", [{f"key{i}": "x"} for i in range(33)]
    )  # each lacks 'input' and 'output'
    problems = problems_of(options(tmp_path))
    assert len(problems) == 21 and problems[-1] == "and 46 more"


def test_what_is_equal_in_many_instances_is_said_once(tmp_path: Path) -> None:
    write_task(tmp_path, "task1_a", [{"input": "x"}] * 33)
    assert problems_of(options(tmp_path)) == (
        f"{tmp_path}/task1_a.json, instances 1 to 33: missing key 'output', found input",
    )


def test_a_folder_that_is_not_there_or_empty(tmp_path: Path) -> None:
    assert (
        "is not a folder; natural-instructions needs one with task*.json files"
        in problems_of(options(tmp_path / "no"))[0]
    )
    assert problems_of(options(tmp_path)) == (f"{tmp_path}: no task files; looked for *.json",)


def test_the_real_task_files_give_an_independent_count(natural_instructions_folder: Path) -> None:
    expected = {}
    for path in (natural_instructions_folder / "tasks").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        kept = sum(1 for instance in content["Instances"] if len(instance["input"]) < 200)
        if kept >= 20:
            expected[path.stem] = (int(0.2 * kept), content["Categories"][0])
    assert 0 < len(expected) < 44  # a limit of 200 characters, so that rows and tasks do fall out
    reading = read(options(natural_instructions_folder, input_limit=200, sample_fraction=0.2), 42)
    assert {task.name: (len(task.examples), task.category) for task in reading.tasks} == expected
    assert len(reading.skipped) == 44 - len(expected)


def test_all_real_rows_have_fewer_than_1024_characters(natural_instructions_folder: Path) -> None:
    reading = read(options(natural_instructions_folder), 0)
    files = list((natural_instructions_folder / "tasks").glob("*.json"))
    rows = [
        row for path in files for row in json.loads(path.read_text(encoding="utf-8"))["Instances"]
    ]
    assert (len(reading.tasks), reading.skipped) == (len(files), ())
    assert sum(len(task.examples) for task in reading.tasks) == sum(
        len(row["input"]) < 1024 for row in rows
    )
