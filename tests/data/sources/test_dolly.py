"""Dolly in its original form."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedmira.config import DataSettings
from fedmira.data.sources.dolly import read
from fedmira.errors import DataError


def row(category: str, number: int, **changes: Any) -> dict[str, Any]:
    return {
        "instruction": f"Do {number}.",
        "context": "c",
        "response": "r",
        "category": category,
        **changes,
    }


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def options(path: Path, **keys: Any) -> DataSettings:
    return DataSettings(source="dolly", path=str(path), **keys)


def test_a_task_per_category_sorted_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [row("qa", 1), row("brain", 2), row("qa", 3, context="")])
    for place in (path, tmp_path):
        tasks = read(options(place), 0).tasks
        assert [(task.name, task.category, len(task.examples)) for task in tasks] == [
            ("brain", "brain", 1),
            ("qa", "qa", 2),
        ]
    example = tasks[1].examples[0]
    assert (example.instruction, example.input, example.output, example.where) == (
        "Do 1.",
        "c",
        "r",
        f"{path}:1",
    )


def test_problems_carry_file_and_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl",
        [
            row("qa", 1),
            {"instruction": "x", "response": "y"},
            row("qa", 3, response=" "),
            row("", 4),
        ],
    )
    with path.open("ab") as handle:
        handle.write(b'{"instruction": \n')
    with pytest.raises(DataError) as error:
        read(options(path), 0)
    assert sorted(error.value.problems) == [
        f"{path}:2: missing key 'category', found instruction, response",
        f"{path}:2: missing key 'context', found instruction, response",
        f"{path}:3: empty response; a row needs text to learn",
        f"{path}:4: 'category' is empty; every row needs a client",
        f"{path}:5: broken JSON: Expecting value (column 17)",
    ]


def test_what_was_looked_for_is_said(tmp_path: Path) -> None:
    def assert_says(place: Path, message: str) -> None:
        with pytest.raises(DataError, match=message):
            read(options(place), 0)

    assert_says(tmp_path / "no", "does not exist; dolly needs its .jsonl file")
    assert_says(tmp_path, r"looked for one \*.jsonl file, found none")
    assert_says(write(tmp_path / "a.jsonl", []), "a.jsonl: holds no rows")
    write(tmp_path / "b.jsonl", [])
    assert_says(tmp_path, "found a.jsonl, b.jsonl; set data.path to the file")


def test_the_real_file_gives_an_independent_count(dolly_folder: Path) -> None:
    (path,) = dolly_folder.glob("*.jsonl")
    expected = Counter(
        json.loads(line)["category"]
        for line in path.read_text(encoding="utf-8").split("\n")
        if line
    )
    tasks = read(options(dolly_folder), 0).tasks
    assert {task.name: len(task.examples) for task in tasks} == expected
    assert [task.name for task in tasks] == sorted(expected) and len(tasks) == 8
