"""From settings to encoded clients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.templates import TEMPLATES, byte_tokenizer
from fedmira.config import DataSettings
from fedmira.data import Dataset, load_clients, told_left_out
from fedmira.data.sources.demo import DEMO_TEST_ROWS, demo_tasks
from fedmira.errors import DataError


def write_clients(folder: Path, sizes: dict[str, int]) -> DataSettings:
    for client, size in sizes.items():
        rows = [
            {"instruction": "w1", "input": f"w{i}", "output": f"w{i} w{i}"} for i in range(size)
        ]
        (folder / f"{client}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return DataSettings(source="jsonl", path=str(folder), prompt="plain")


def test_the_demo_has_its_own_test_rows_and_the_sizes_of_its_tasks() -> None:
    data = load_clients(DataSettings(), 0, byte_tokenizer())
    expected = {task.name: (len(task.examples), task.category) for task in demo_tasks(0)}
    assert {
        client.client_id: (len(client.train), client.category) for client in data.clients
    } == expected
    assert all(
        len(client.test) == DEMO_TEST_ROWS == len(client.references) for client in data.clients
    )
    assert data.skipped == ()


def test_clients_are_sorted_and_the_references_are_the_test_responses(
    tmp_path: Path, words: Any
) -> None:
    data = load_clients(write_clients(tmp_path, {"b": 10, "a": 20}), 0, words)
    assert [client.client_id for client in data.clients] == ["a", "b"]
    for client in data.clients:
        assert len(client.references) == len(client.test) > 0
        for row, reference in zip(client.test, client.references, strict=True):
            assert words.decode(list(row.response[:-1])).split() == reference.split()


def test_a_client_is_the_same_whoever_else_takes_part(tmp_path: Path, words: Any) -> None:
    settings = write_clients(tmp_path, {"a": 20})
    alone = load_clients(settings, 3, words).clients[0]
    write_clients(tmp_path, {"0-first": 9, "z": 30})
    assert load_clients(settings, 3, words).clients[1] == alone


def test_of_very_many_left_out_the_first_and_how_many_more_are_told() -> None:
    few, many = ([f"{n}: 1 rows" for n in range(count)] for count in (3, 50))
    assert told_left_out(few) == [f"left out: {each}" for each in few]
    *first, last = told_left_out(many)
    assert first == [f"left out: {each}" for each in many[: len(first)]]
    assert last.startswith(f"left out: {50 - len(first)} more")


def test_skipped_clients_are_reported(
    tmp_path: Path, words: Any, caplog: pytest.LogCaptureFixture
) -> None:
    data = load_clients(write_clients(tmp_path, {"a": 20, "tiny": 2}), 0, words)
    assert "left out: tiny: 2 rows; data.min_rows is 4" in caplog.messages
    assert [client.client_id for client in data.clients] == ["a"]
    assert data.skipped == ("tiny: 2 rows; data.min_rows is 4",)


def test_max_rows_is_given_to_the_sorted_clients_in_turn(tmp_path: Path, words: Any) -> None:
    settings = write_clients(tmp_path, {"c": 20, "a": 20, "b": 20}).model_copy(
        update={"max_rows": (4, 8)}
    )
    assert [len(client.train) for client in load_clients(settings, 0, words).clients] == [4, 8, 4]


def test_sample_fraction_is_a_floor(tmp_path: Path, words: Any) -> None:
    settings = write_clients(tmp_path, {"a": 29}).model_copy(update={"sample_fraction": 0.5})
    client = load_clients(settings, 0, words).clients[0]
    assert len(client.train) + len(client.test) == 14


def test_a_summary_counts_rows_and_tokens(tmp_path: Path, words: Any) -> None:
    (summary,) = load_clients(write_clients(tmp_path, {"a": 10}), 0, words).summaries()
    # Plain prompt: <s> w1 \n \n wI \n \n; response: wI, space, wI, </s>.
    assert (summary.client_id, summary.train_rows, summary.validation_rows, summary.test_rows) == (
        "a",
        8,
        0,
        2,
    )
    assert (summary.train_tokens, summary.train_response_tokens, summary.longest_row) == (
        8 * (7 + 4),
        8 * 4,
        11,
    )
    assert (
        summary.truncated_prompts,
        summary.truncated_responses,
        summary.duplicates,
        summary.overlaps,
    ) == (0, 0, 0, 0)


def column_file(folder: Path, clients: list[str]) -> DataSettings:
    rows = [
        {"client": client, "instruction": "w1", "input": f"w{i}", "output": "w2"}
        for client in clients
        for i in range(5)
    ]
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return DataSettings(
        source="jsonl", path=str(folder / "all.jsonl"), partition="column", prompt="plain"
    )


def test_names_of_clients_become_ids_that_name_folders_everywhere(
    tmp_path: Path, words: Any
) -> None:
    names = ["Klinik Sued", "\u6771", "con", "fine"]
    data = load_clients(column_file(tmp_path, names), 0, words)
    ids = ["Klinik-Sued", "con_", "fine", "\u6771"]
    assert [client.client_id for client in data.clients] == ids
    changed = [note for note in data.notes if "is called" in note]
    assert [note.split("'")[1:4:2] for note in changed] == [
        ["Klinik Sued", "Klinik-Sued"],
        ["con", "con_"],
    ]


def test_a_name_of_which_nothing_can_name_a_folder_is_refused(tmp_path: Path, words: Any) -> None:
    with pytest.raises(DataError, match="client id '..' cannot name a folder"):
        load_clients(column_file(tmp_path, ["..", "fine"]), 0, words)


def test_names_that_become_one_id_are_refused(tmp_path: Path, words: Any) -> None:
    with pytest.raises(DataError, match="'Klinik-Sued' and 'Klinik-Sued' would share a folder"):
        load_clients(column_file(tmp_path, ["Klinik Sued", "Klinik/Sued"]), 0, words)


def test_client_ids_that_differ_in_case_only_are_refused(tmp_path: Path, words: Any) -> None:
    with pytest.raises(DataError, match="client ids 'Law' and 'law' would share a folder"):
        load_clients(column_file(tmp_path, ["law", "Law"]), 0, words)


def test_categories_whose_client_ids_fall_together_are_refused(tmp_path: Path, words: Any) -> None:
    rows = [
        {"category": name, "instruction": "w1", "input": f"w{i}", "output": "w2"}
        for name in ("a b", "a/b")
        for i in range(5)
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(DataError, match="client ids 'a-b' and 'a-b' would share a folder"):
        load_clients(
            DataSettings(source="jsonl", path=str(tmp_path / "all.jsonl"), partition="category"),
            0,
            words,
        )


def test_all_clients_that_cannot_be_split_are_reported_together(tmp_path: Path, words: Any) -> None:
    settings = write_clients(tmp_path, {"a": 1, "b": 1, "c": 5}).model_copy(update={"min_rows": 1})
    with pytest.raises(DataError) as error:
        load_clients(settings, 0, words)
    assert [problem.split("'")[1] for problem in error.value.problems] == ["a", "b"]


def test_real_natural_instructions_through_a_real_tokenizer(
    natural_instructions_folder: Path, gpt2: Any
) -> None:
    settings = DataSettings(
        source="natural-instructions",
        path=str(natural_instructions_folder),
        clients=3,
        sample_fraction=0.2,
        validation_fraction=0.1,
    )
    data = load_clients(settings, 42, gpt2)
    assert data == load_clients(settings, 42, gpt2)
    assert [client.client_id.split("_")[0] for client in data.clients] == [
        "task033",
        "task037",
        "task040",
    ]
    for client in data.clients:  # int(0.2 * 400) = 80 rows: 8 test; 72 / 9 = 8 validation; 64 train
        assert [len(part) for part in (client.train, client.validation, client.test)] == [64, 8, 8]
        assert all(row.response[-1] == gpt2.eos_token_id for row in client.train)


def test_real_dolly_in_eight_times_ten_clients(dolly_folder: Path, gpt2: Any) -> None:
    settings = DataSettings(
        source="dolly",
        path=str(dolly_folder),
        partition="category",
        clients_per_category=10,
        sample_fraction=0.2,
    )
    data = load_clients(settings, 0, gpt2)
    assert len(data.clients) == 80 and len({client.category for client in data.clients}) == 8


def test_importing_the_data_room_loads_no_heavy_library() -> None:
    heavy = {"datasets", "transformers", "torch", "jinja2"}
    code = f"import sys, fedmira.data; print(sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_an_empty_dataset_is_not_possible(tmp_path: Path, words: Any) -> None:
    (tmp_path / "a.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="a.jsonl: holds no rows"):
        load_clients(DataSettings(source="jsonl", path=str(tmp_path)), 0, words)
    assert Dataset(()).summaries() == ()


@pytest.mark.parametrize(("long", "warned"), [(1, False), (2, True)])
def test_cut_prompts_are_a_warning_above_one_in_twenty(
    tmp_path: Path, words: Any, caplog: pytest.LogCaptureFixture, long: int, warned: bool
) -> None:
    """Of 20 rows one cut prompt is 5 %, which passes, two are 10 %.

    A long row has <s>, 30 words and 29 spaces, w0 and </s>: 62 tokens.
    """
    rows = [
        {
            "instruction": " ".join(["w1"] * (30 if i < long else 2)),
            "input": f"w{i}",
            "output": "w0",
        }
        for i in range(20)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = DataSettings(source="jsonl", path=str(tmp_path), prompt="plain", max_length=32)
    (client,) = load_clients(settings, 0, words).clients
    assert client.truncated_prompts == long
    # a blank line before and one behind the input, of two tokens each, and the input itself
    longest = 62 + 2 + 2 + 1
    told = (
        f"{long} of 20 prompts lose their middle: with its response each is longer than "
        "data.max_length (32 tokens; the longest has "
        f"{longest}); raise data.max_length"
    )
    assert [record.getMessage() for record in caplog.records] == ([told] if warned else [])


def write_rows(folder: Path, clients: dict[str, list[dict[str, Any]]], **keys: Any) -> DataSettings:
    for client, rows in clients.items():
        (folder / f"{client}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return DataSettings(source="jsonl", path=str(folder), **keys)


def sides(data: Dataset) -> list[tuple[set[Any], set[Any]]]:
    return [
        ({row.prompt for row in client.train}, {row.prompt for row in client.test})
        for client in data.clients
    ]


def test_rows_that_are_rendered_alike_are_on_one_side_and_once(tmp_path: Path) -> None:
    rows = [
        row
        for i in range(20)
        for row in (
            {"instruction": f"q {i}", "output": "cards"},
            {
                "messages": [
                    {"role": "user", "content": f" q {i}" if i % 2 else f"q {i}"},
                    {"role": "assistant", "content": "cards"},
                ]
            },
        )
    ]
    settings = write_rows(tmp_path, {"a": rows}, prompt="chat")
    data = load_clients(settings, 0, byte_tokenizer(TEMPLATES["llama3"][0]))
    ((train, test),) = sides(data)
    assert not train & test and len(train) + len(test) == 20
    assert data.clients[0].duplicates > 0


def test_rows_that_are_cut_alike_are_on_one_side(tmp_path: Path, words: Any) -> None:
    # Two of three words in the middle are cut, so rows with the same begin and end read the same.
    rows = [
        {"instruction": f"w{i} " + f"w{50 + k} " * 60 + f"w{i}", "output": f"w{k}"}
        for i in range(12)
        for k in range(3)
    ]
    settings = write_rows(tmp_path, {"a": rows}, prompt="plain", max_length=40)
    ((train, test),) = sides(load_clients(settings, 0, words))
    assert test and not train & test


def test_test_rows_that_others_train_on_are_counted(tmp_path: Path, words: Any) -> None:
    same = [{"instruction": f"w{i}", "output": "w1"} for i in range(20)]
    other = [{"instruction": f"w{i}", "output": "w1"} for i in range(40, 60)]
    settings = write_rows(tmp_path, {"a": same, "b": same, "c": other}, prompt="plain")
    data = load_clients(settings, 0, words)
    trained = [set(client.train) for client in data.clients]
    expected = sum(
        any(row in rows for j, rows in enumerate(trained) if j != i)
        for i, client in enumerate(data.clients)
        for row in client.test
    )
    assert expected > 0
    tested = sum(len(client.test) for client in data.clients)
    assert f"{expected} of {tested} test rows also stand among the training rows" in data.notes[0]


def test_cut_responses_are_said(
    tmp_path: Path, words: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"instruction": f"w{i}", "output": "w2 " * 40} for i in range(10)]
    data = load_clients(write_rows(tmp_path, {"a": rows}, prompt="plain", max_length=20), 0, words)
    (note,) = [note for note in data.notes if "responses" in note]
    assert note.startswith("10 of 10 responses lose their end") and note in caplog.text


def test_what_all_rows_share_is_known(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"q {i}"},
                {"role": "assistant", "content": "cards"},
            ]
        }
        for i in range(10)
    ]
    tokenizer = byte_tokenizer(TEMPLATES["chatml"][0])
    (client,) = load_clients(write_rows(tmp_path, {"a": rows}, prompt="chat"), 0, tokenizer).clients
    assert client.shared_prompt == {
        "instruction": "",
        "system": "Be brief.",
        "tools": "",
        "conversation": True,
    }
    rows[0]["messages"][0]["content"] = "Be long."
    (client,) = load_clients(
        write_rows(tmp_path, {"a": rows}, prompt="chat", train_fraction=0.9), 0, tokenizer
    ).clients
    assert client.system in ("", "Be brief.")


def test_references_are_what_answers_can_be(tmp_path: Path) -> None:
    rows = [{"instruction": f"q {i}", "output": "one </s> two"} for i in range(10)]
    data = load_clients(write_rows(tmp_path, {"a": rows}, prompt="plain"), 0, byte_tokenizer())
    assert set(data.clients[0].references) == {"one"}
    assert any(note.startswith("10 of 10 answers are another text") for note in data.notes)
    special = [{"instruction": f"q {i}", "output": "<POS>"} for i in range(10)]
    data = load_clients(write_rows(tmp_path, {"a": special}, prompt="plain"), 0, byte_tokenizer())
    assert set(data.clients[0].references) == {"<POS>"} and data.notes == ()
