"""A client that comes later: all its rows train, and none is told apart from its like."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedmira.config import DataSettings
from fedmira.data import Newcomer, load_newcomer, rows_from_objects
from fedmira.errors import DataError
from tiny import tiny_tokenizer

Write = Callable[[str, Sequence[dict[str, Any]]], Path]


def rows(first: int, count: int, **more: str) -> list[dict[str, Any]]:
    return [
        {"instruction": "w1 w2", "input": f"w{number}", "output": f"w{number + 1}", **more}
        for number in range(first, first + count)
    ]


@pytest.fixture(name="write")
def _write(tmp_path: Path) -> Write:
    def written(name: str, lines: Sequence[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return path

    return written


def loaded(path: Path, **changes: Any) -> Newcomer:
    settings = DataSettings(
        source="jsonl", path=str(path), prompt="plain", max_length=64, **changes
    )
    return load_newcomer(settings, 0, tiny_tokenizer(), "west")


def sizes(found: Newcomer) -> tuple[int, int]:
    return len(found.data.train), len(found.data.test)


def test_a_file_needs_no_client_column(write: Write) -> None:
    found = loaded(write("some.jsonl", rows(10, 5)))
    assert sizes(found) == (5, 0) and found.data.client_id == "west"
    assert len(set(found.groups)) == 5 and found.data.instruction == "w1 w2"


def test_a_folder_of_parts_is_one_client(write: Write, tmp_path: Path) -> None:
    write("new/train.jsonl", [*rows(10, 5), *rows(10, 1)])
    write("new/validation.jsonl", rows(20, 2))
    write("new/test.jsonl", rows(12, 4))
    found = loaded(tmp_path / "new")
    # Of 10..14, 12..14 are asked in the test rows; 20 and 21 were set aside for choosing.
    assert sizes(found) == (4, 4)
    assert (found.data.overlaps, found.data.duplicates) == (3, 1)
    assert not {row.prompt for row in found.data.train} & {row.prompt for row in found.data.test}


@pytest.mark.parametrize("place", ["above/any/train.jsonl", "above/any.jsonl"])
def test_a_folder_that_holds_one_client_is_read(write: Write, tmp_path: Path, place: str) -> None:
    write(place, rows(10, 5))
    assert sizes(loaded(tmp_path / "above")) == (5, 0)


def test_of_several_clients_the_one_of_the_name_is_taken(write: Write) -> None:
    lines = [*rows(10, 3, client="west"), *rows(20, 4, client="north")]
    assert sizes(loaded(write("all.jsonl", lines))) == (3, 0)
    path = write("others.jsonl", [*rows(10, 3, client="east"), *rows(20, 4, client="north")])
    with pytest.raises(DataError, match=r"holds 2 clients, and none is called 'west'; it holds"):
        loaded(path)


def test_how_the_run_deals_and_thins_its_rows_does_not_count(write: Write) -> None:
    found = loaded(
        write("some.jsonl", rows(10, 6)),
        sample_fraction=0.5,
        max_rows=2,
        clients=3,
        min_rows=50,
        partition="category",
    )
    assert sizes(found) == (6, 0)


def test_rows_that_ask_the_same_are_in_one_group(write: Write) -> None:
    lines = rows(10, 4)
    again = [{**lines[1], "output": "w70"}]
    found = loaded(write("some.jsonl", [*lines, *again]))
    same = [
        group
        for row, group in zip(found.data.train, found.groups, strict=True)
        if row.prompt == found.data.train[1].prompt
    ]
    assert len(found.groups) == 5 and len(set(found.groups)) == 4 and len(set(same)) == 1


def test_turns_of_a_conversation_are_in_one_group(write: Write) -> None:
    def talk(number: int) -> dict[str, Any]:
        turns = [("user", f"w{number}"), ("assistant", "w5"), ("user", "w8"), ("assistant", "w9")]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    found = loaded(write("talks.jsonl", [talk(number) for number in range(10, 14)]))
    assert len(found.groups) == 8
    assert sorted(found.groups.count(group) for group in set(found.groups)) == [2, 2, 2, 2]


def test_objects_are_rows_too() -> None:
    given = rows_from_objects({"west": {"train": rows(10, 5), "test": rows(30, 2)}})
    settings = DataSettings(source="object", prompt="plain", max_length=64)
    assert sizes(load_newcomer(settings, 0, tiny_tokenizer(), "west", given)) == (5, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{broken\n", "some.jsonl"), ("", "holds no rows"), ('{"who": "w1"}\n', "some.jsonl")],
)
def test_rows_that_cannot_be_read_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        loaded(path)
    with pytest.raises(DataError, match="does not exist"):
        loaded(tmp_path / "nowhere")


def test_no_row_left_to_train_on_is_told(write: Write, tmp_path: Path) -> None:
    write("new/train.jsonl", rows(10, 3))
    write("new/test.jsonl", rows(10, 3))
    with pytest.raises(DataError, match="all of them are test rows"):
        loaded(tmp_path / "new")
