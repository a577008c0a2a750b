"""Users' own rows: layouts, shapes, and messages that name file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedmira.config import DataSettings
from fedmira.data import Example
from fedmira.data.sources.jsonl import read
from fedmira.errors import DataError

ROW = {"instruction": "Do.", "output": "done"}


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def options(path: Path, **keys: Any) -> DataSettings:
    return DataSettings(source="jsonl", path=str(path), **keys)


def problems_of(path: Path, **keys: Any) -> tuple[str, ...]:
    with pytest.raises(DataError) as error:
        read(options(path, **keys), 0)
    return error.value.problems


def example_in(tmp_path: Path, row: Any) -> Example:
    write(tmp_path / "a.jsonl", row)
    return read(options(tmp_path), 0).tasks[0].examples[0]


def test_a_folder_per_client_with_its_own_test_and_validation_rows(tmp_path: Path) -> None:
    write(tmp_path / "law" / "train.jsonl", {**ROW, "category": "office"}, ROW)
    write(tmp_path / "law" / "test.jsonl", {**ROW, "input": "t"})
    write(tmp_path / "law" / "validation.jsonl", {**ROW, "input": "v"})
    write(tmp_path / "bank" / "train.jsonl", ROW)
    (tmp_path / ".cache").mkdir()
    bank, law = read(options(tmp_path), 0).tasks
    assert (bank.name, bank.category, bank.test, bank.validation) == ("bank", "", None, None)
    assert (law.name, law.category, len(law.examples)) == ("law", "office", 2)
    assert [row.input for part in (law.test, law.validation) for row in part or ()] == ["t", "v"]


def test_a_file_per_client(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", ROW)
    write(tmp_path / "a.jsonl", {**ROW, "category": "k"}, ROW)
    assert [
        (task.name, task.category, len(task.examples)) for task in read(options(tmp_path), 0).tasks
    ] == [("a", "k", 2), ("b", "", 1)]


def test_one_file_with_a_client_column(tmp_path: Path) -> None:
    path = write(
        tmp_path / "all.jsonl",
        {**ROW, "shop": 7},
        {**ROW, "shop": "x", "category": "k"},
        {**ROW, "shop": 7},
    )
    tasks = read(options(path, partition="column", column="shop"), 0).tasks
    assert [(task.name, task.category, len(task.examples)) for task in tasks] == [
        ("7", "", 2),
        ("x", "k", 1),
    ]


def test_one_file_is_grouped_by_category_where_clients_are_made_from_categories(
    tmp_path: Path,
) -> None:
    path = write(
        tmp_path / "all.jsonl",
        {**ROW, "category": "k"},
        {**ROW, "category": "l"},
        {**ROW, "category": "k"},
    )
    tasks = read(options(path, partition="category"), 0).tasks
    assert [(task.name, task.category, len(task.examples)) for task in tasks] == [
        ("k", "k", 2),
        ("l", "l", 1),
    ]


@pytest.mark.parametrize(
    ("row", "instruction", "material"),
    [
        ({"instruction": "i", "input": "m", "output": "o"}, "i", "m"),
        ({"instruction": "i", "output": "o", "response": None}, "i", ""),
        ({"instruction": "i", "input": None, "output": "o"}, "i", ""),
        ({"instruction": "i", "context": "m", "response": "o"}, "i", "m"),
        ({"instruction": "i", "response": "o", "messages": None}, "i", ""),
        ({"prompt": "i", "completion": "o", "other": [1]}, "i", ""),
    ],
)
def test_instruction_shapes(
    tmp_path: Path, row: dict[str, Any], instruction: str, material: str
) -> None:
    assert example_in(tmp_path, row) == Example(instruction, material, "o")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_messages_end_at_the_last_answer(tmp_path: Path) -> None:
    turns = [
        turn("system", "s"),
        turn("user", "1"),
        turn("assistant", "a"),
        turn("user", "2"),
        turn("assistant", "o"),
        turn("user", "3"),
    ]
    example = example_in(tmp_path, {"messages": turns})
    assert example == Example(
        "", "", "o", messages=(("system", "s"), ("user", "1"), ("assistant", "a"), ("user", "2"))
    )


def test_prompt_and_completion_as_messages(tmp_path: Path) -> None:
    example = example_in(
        tmp_path, {"prompt": [turn("user", "q")], "completion": [turn("assistant", "o")]}
    )
    assert example == Example("", "", "o", messages=(("user", "q"),))


def test_text_passes_unchanged_with_blank_lines_marks_and_line_separators(tmp_path: Path) -> None:
    row = {"instruction": " caf\u00e9\u2028two ", "output": "\u2028x\n"}
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf\r\n" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n\n"
    )
    (example,) = read(options(tmp_path), 0).tasks[0].examples
    assert (example.instruction, example.output, example.where) == (
        " caf\u00e9\u2028two ",
        "\u2028x\n",
        f"{tmp_path}/a.jsonl:2",
    )


def test_all_row_problems_of_all_files_come_together(tmp_path: Path) -> None:
    write(
        tmp_path / "a.jsonl",
        {"text": "x"},
        {},
        {"instruction": "i", "input": "m"},
        {"instruction": "i", "output": ""},
        {"instruction": {"a": 5}, "output": "o"},
        {"prompt": "p"},
        {"instruction": " ", "output": "o"},
        [1],
        {"instruction": "i", "output": "\ud83d"},
        {"instruction": "i", "output": None},
    )
    write(
        tmp_path / "b" / "train.jsonl",
        {"messages": []},
        {"messages": [turn("user", "x")]},
        {"messages": [turn("assistant", "x")]},
        {"messages": [{"role": "user"}, 3]},
        {"prompt": 3, "completion": [turn("assistant", "x")]},
        {"messages": [turn("user", "x"), turn("assistant", "\n")]},
    )
    first, second = f"{tmp_path}/a.jsonl", f"{tmp_path}/b/train.jsonl"
    shapes = (
        "a row needs instruction and output (input), instruction and response (context), prompt "
        "and completion, question and answer, or messages"
    )
    assert problems_of(tmp_path) == (
        f"{first}:1: unknown shape, found text; {shapes}; name the columns in data.columns",
        f"{first}:2: unknown shape, found no keys; {shapes}",
        f"{first}:3: missing key 'output' or 'response', found instruction, input",
        f"{first}:4: empty response; a row needs text to learn",
        f"{first}:5: 'instruction' is of type dict; must be text",
        f"{first}:6: missing key 'completion', found prompt",
        f"{first}:7: empty prompt; a row needs an instruction",
        f"{first}:8: holds a list; JSON Lines holds one object a line",
        f"{first}:9: 'output' holds half of a surrogate pair at character 1; no tokenizer "
        "can encode it",
        f"{first}:10: missing key 'output' or 'response', found instruction, output (null)",
        f"{second}:1: 'messages' must be a list of messages that is not empty",
        f"{second}:2: no assistant message answers another message, found roles user",
        f"{second}:3: no assistant message answers another message, found roles assistant",
        f"{second}:4, messages 1: missing key 'content', found role",
        f"{second}:4, messages 2: is of type int; must be an object with 'role' and 'content'",
        f"{second}:5: 'prompt' must be a list of messages that is not empty",
        f"{second}:6: empty response; a row needs text to learn",
    )


def test_broken_json_and_wrong_encoding_name_line_and_byte(tmp_path: Path) -> None:
    good = json.dumps(ROW).encode() + b"\n"
    data = good + b'{"instruction": "x"\n' + good + b'{"instruction": "caf\xe9"}\n'
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl").write_bytes(b"[" + good.strip() + b",\n" + good.strip() + b"]\n")
    assert problems_of(tmp_path) == (
        f"{tmp_path}/a.jsonl:2: broken JSON: Expecting ',' delimiter (column 20)",
        f"{tmp_path}/a.jsonl: not UTF-8 at byte {data.index(0xE9)}; save the file as UTF-8",
        f"{tmp_path}/b.jsonl:1: broken JSON: Expecting value (column {len(good) + 2}); "
        "JSON Lines holds one object a line, not one list",
        f"{tmp_path}/b.jsonl:2: broken JSON: Extra data (column {len(good)})",
    )


def test_a_missing_or_empty_client_column(tmp_path: Path) -> None:
    path = write(
        tmp_path / "all.jsonl",
        {**ROW, "client": "a"},
        ROW,
        {**ROW, "client": " "},
        {**ROW, "client": True},
    )
    assert problems_of(path) == (
        f"{path}:2: missing key 'client', found instruction, output; data.column names the "
        "client column",
        f"{path}:3: 'client' is empty; every row needs a client",
        f"{path}:4: 'client' is of type bool; must be text",
    )
    path = write(tmp_path / "all.jsonl", ROW)
    assert problems_of(path, partition="category") == (
        f"{path}:1: missing key 'category', found instruction, output; the partition needs "
        "a category in every row",
    )


def test_a_column_that_no_row_has_is_one_problem_with_the_likely_one(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", *({**ROW, "dept": "a"} for _ in range(60)))
    assert problems_of(path, column="department") == (
        f"{path}, lines 1 to 60: missing key 'department', found instruction, output, "
        "dept; did you mean --set data.column=dept?",
    )
    path = write(tmp_path / "all.jsonl", {**ROW, "shop": "a", "branch_id": 3})
    assert problems_of(path, column="branch")[0].endswith(
        "; did you mean --set data.column=branch_id?"
    )
    assert problems_of(path, column="xyz")[0].endswith(
        "; data.column names the client column; is it one of shop, branch_id?"
    )


def test_equal_problems_of_scattered_lines_are_one_with_their_numbers(tmp_path: Path) -> None:
    bad = [2, 4, 5, 6, 9, 11, 13, 15, 16]
    path = write(
        tmp_path / "a.jsonl",
        *({**ROW, "output": "" if number in bad else "x"} for number in range(1, 18)),
    )
    # Five runs of lines are named, and of the remaining one, 15 to 16, the lines are counted.
    assert problems_of(tmp_path) == (
        f"{path}, lines 2, 4 to 6, 9, 11, 13 and 2 more: empty response; a row needs text to learn",
    )


def test_rows_of_unknown_names_say_how_to_name_their_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"text": "q", "label": "a"}, {"text": "p", "label": "b"})
    (problem,) = problems_of(tmp_path)
    assert problem.startswith(f"{tmp_path}/a.jsonl, lines 1 to 2: unknown shape, found text, label")
    assert problem.endswith('; set data.columns = {instruction = "text", output = "label"}')
    columns = {"instruction": "text", "output": "label"}
    (task,) = read(options(tmp_path, columns=columns), 0).tasks
    assert list(task.examples) == [Example("q", "", "a"), Example("p", "", "b")]


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    path = write(tmp_path / "all.json", {**ROW, "client": "a"}, {**ROW, "client": "b"})
    assert [task.name for task in read(options(path), 0).tasks] == ["a", "b"]


def test_layout_problems_say_what_was_looked_for(tmp_path: Path) -> None:
    assert (
        "does not exist; jsonl needs PATH/<client>/train.jsonl" in problems_of(tmp_path / "no")[0]
    )
    assert "holds no clients; looked for PATH/<client>/train.jsonl" in problems_of(tmp_path)[0]
    write(tmp_path / "law" / "other.jsonl", ROW)
    write(tmp_path / "bank" / "train.jsonl")
    write(tmp_path / "bank.jsonl", ROW)
    found = problems_of(tmp_path)
    assert found[:2] == (
        f"{tmp_path}: client 'bank' stands there twice, as bank.jsonl and as bank/; keep one",
        f"{tmp_path}/bank/train.jsonl: holds no rows",
    )
    assert found[2].startswith(f"{tmp_path}/law/other.jsonl: not a file of a client")
    assert found[3] == f"{tmp_path}/law: looked for train.jsonl, found other.jsonl"
    write(tmp_path / "train.jsonl", ROW)
    assert "train.jsonl belong into a folder per client" in problems_of(tmp_path)[0]


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl")
    assert problems_of(path) == (f"{path}: holds no rows",)
