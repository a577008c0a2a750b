"""Rows of users: all that they say reaches the model, or what does not is named."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest

from data.templates import TEMPLATES
from field.inputs import (
    Reads,
    byte_tokenizer,
    call,
    chat_ids,
    check,
    noted,
    options,
    refused,
    run,
    run_json,
    watering,
    write_base,
    write_clients,
    write_lines,
    write_random_base,
)

Row = dict[str, Any]

HEARING = TEMPLATES["chatml"][0].replace(
    "{{ m.content }}",
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}CALLS {{ c.function.name }} "
    "{{ c.function.arguments | tojson }}{% endfor %}",
)
"""A template that writes calls of functions."""
OFFERING = "{% if tools %}MAY CALL {{ tools | tojson }}\n{% endif %}" + HEARING
"""A template that also writes which functions there are."""


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A base whose template writes functions and their calls, and its tokenizer."""
    tokenizer = byte_tokenizer(OFFERING)
    return write_random_base(tmp_path_factory.mktemp("hearing") / "base", tokenizer), tokenizer


def renamed(rows: Sequence[Row], names: Mapping[str, str]) -> list[Row]:
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]


# Kind A: parts of a row are dropped.


@pytest.mark.parametrize("form", ["alpaca", "plain", "chat"])
@pytest.mark.parametrize(
    "names",
    [
        {"output": "response"},
        {"output": "answer"},
        {"input": "context", "output": "response"},
        {"input": "context"},
        {"input": "question"},
        {"output": "completion"},
    ],
    ids=lambda names: " and ".join(names.values()),
)
def test_an_input_beside_a_response_stands_in_the_prompt(
    names: dict[str, str], form: str, plain_base: Path, reads: Reads, tmp_path: Path
) -> None:
    """Kind A."""
    usual = watering("fern")
    check(plain_base, write_clients(tmp_path / "usual", {"fern": usual}), data__prompt=form)
    expected = reads.rows("fern")
    rows = write_clients(tmp_path / "rows", {"fern": renamed(usual, names)})
    check(plain_base, rows, data__prompt=form)
    assert reads.rows("fern") == expected and len(expected) == len(usual)


@pytest.mark.parametrize("names", [("question", "context"), ("question", "input")])
def test_what_a_question_is_about_stands_in_the_prompt(
    names: tuple[str, str], plain_base: Path, reads: Reads, tokenizer: Any, tmp_path: Path
) -> None:
    """Kind A."""
    ask, about = names
    rows = [
        {ask: f"how wet is {place} ?", about: f"bed {place} got rain", "answer": "wet"}
        for place in range(10)
    ]
    check(plain_base, write_clients(tmp_path, {"fern": rows}))
    prompts = reads.prompts(tokenizer, "fern")
    assert len(prompts) == len(rows)
    for row in rows:
        assert sum(row[ask] in prompt and row[about] in prompt for prompt in prompts) == 1


@pytest.mark.parametrize("key", ["passage", "document", "choices", "query"])
def test_a_key_of_the_task_that_would_be_dropped_is_named(
    key: str, plain_base: Path, tmp_path: Path
) -> None:
    """Kind A."""
    rows = [{**row, key: f"only here {place}"} for place, row in enumerate(watering("fern"))]
    folder = write_clients(tmp_path / "rows", {"fern": rows})
    refused(call("check", *options(plain_base, folder)), f"'{key}'", "would not reach the model")
    told = options(plain_base, folder, data__columns__input=key)
    ended = call("check", *told, "--format", "json")
    # The old input is then a column that is not read, which is told.
    assert ended.code == 0 and "input (column)" in noted(json.loads(ended.out), "not read")


def alpaca_rows(system: str, history: object) -> list[Row]:
    return [
        {system: f"Mind bed {place}.", "history": history, **row}
        for place, row in enumerate(watering("fern"))
    ]


@pytest.mark.parametrize("system", ["system", "system_prompt"])
@pytest.mark.parametrize("history", ["pairs", "messages", "text"])
def test_a_system_text_and_earlier_turns_become_messages(
    system: str, history: str, plain_base: Path, reads: Reads, tokenizer: Any, tmp_path: Path
) -> None:
    """Kind A."""
    pairs = [["is it dry ?", "a little"], ["and cold ?", "no"]]
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    given = {"pairs": pairs, "messages": turns, "text": json.dumps(pairs)}[history]
    rows = alpaca_rows(system, given)
    folder = write_clients(tmp_path, {"fern": rows})
    check(plain_base, folder, data__prompt="chat", data__train_on="last")
    found = {(*row.prompt, *row.response) for row in reads.rows("fern")}
    expected = {
        tuple(
            chat_ids(
                tokenizer,
                [
                    {"role": "system", "content": row[system]},
                    *turns,
                    {"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"},
                    {"role": "assistant", "content": row["output"]},
                ],
            )
        )
        for row in rows
    }
    assert found == expected and len(found) == len(rows)


@pytest.mark.parametrize("form", ["alpaca", "plain"])
def test_a_system_text_and_earlier_turns_stand_in_prompts_without_a_template(
    form: str, plain_base: Path, reads: Reads, tokenizer: Any, tmp_path: Path
) -> None:
    """Kind A."""
    rows = alpaca_rows("system", [["is it dry ?", "a little"]])
    folder = write_clients(tmp_path, {"fern": rows})
    check(plain_base, folder, data__prompt=form, data__train_on="last")
    prompts = reads.prompts(tokenizer, "fern")
    assert len(prompts) == len(rows)
    for row in rows:
        texts = (row["system"], "is it dry ?", "a little", row["instruction"], row["input"])
        assert sum(all(text in prompt for text in texts) for prompt in prompts) == 1


def calling(place: int, content: object, arguments: object) -> Row:
    """A conversation in which the assistant looks something up before it answers."""
    call = {"type": "function", "function": {"name": "rain", "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": f"does bed {place} need water ?"},
            {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "content": "4 mm"},
            {"role": "assistant", "content": "no"},
        ],
        "tools": [{"type": "function", "function": {"name": "rain", "parameters": {"day": {}}}}],
    }


@pytest.mark.parametrize("content", ["", None], ids=["empty text", "null"])
@pytest.mark.parametrize("as_text", [False, True])
def test_functions_and_their_calls_reach_the_template(
    content: object, as_text: bool, hearing: tuple[Path, Any], reads: Reads, tmp_path: Path
) -> None:
    """Kind A."""
    base, tokenizer = hearing
    rows = [
        calling(place, content, json.dumps({"bed": place}) if as_text else {"bed": place})
        for place in range(10)
    ]
    if as_text:
        rows = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    check(base, write_clients(tmp_path, {"fern": rows}), data__prompt="chat", data__max_length=400)
    found = {(*row.prompt, *row.response) for row in reads.rows("fern")}
    expected = set()
    for place in range(10):
        own = calling(place, "", {"bed": place})
        for stop in (2, 4):
            ids = chat_ids(tokenizer, own["messages"][:stop], tools=own["tools"])
            expected.add(tuple(ids))
    assert found == expected and len(found) == 20
    answers = reads.answers(tokenizer, "fern")
    assert sum('CALLS rain {"bed": ' in answer for answer in answers) == 10


@pytest.mark.parametrize(
    ("template", "lost"), [(TEMPLATES["chatml"][0], "tool_calls"), (HEARING, "tools")]
)
def test_functions_that_the_template_does_not_write_are_refused(
    template: str, lost: str, plain_base: Path, tmp_path: Path
) -> None:
    """Kind A."""
    from transformers import AutoModelForCausalLM

    made: Any = AutoModelForCausalLM
    base = write_base(tmp_path / "base", made.from_pretrained(plain_base), byte_tokenizer(template))
    rows = [calling(place, "", {"bed": place}) for place in range(10)]
    folder = write_clients(tmp_path / "rows", {"fern": rows})
    ended = call("check", *options(base, folder, data__prompt="chat"))
    assert lost in refused(ended, "leaves out tool")
    without_template = call("check", *options(base, folder, data__prompt="alpaca"))
    refused(without_template, "tools and tool_calls", "data.prompt")


# Kind E: test rows seen in training.


def in_two_shapes() -> list[Row]:
    rows = watering("fern", 24)
    return [
        shape
        for row in rows
        for shape in (
            row,
            {
                "messages": [
                    {"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"},
                    {"role": "assistant", "content": row["output"]},
                ]
            },
        )
    ]


def joined_and_apart() -> list[Row]:
    rows = watering("fern", 24)
    return [
        shape
        for row in rows
        for shape in (
            row,
            {
                "instruction": f"{row['instruction']}\n\n{row['input']}",
                "output": f"{row['output']} then",
            },
        )
    ]


def with_outer_blanks() -> list[Row]:
    return [
        {"instruction": f"{before}when for pot {place} ?", "output": "today" + before}
        for place in range(24)
        for before in ("", "\n ")
    ]


def alike_once_cut() -> list[Row]:
    return [
        {"instruction": f"pot {place} {'dry ' * 60}{middle}{'wet ' * 60}", "output": middle}
        for place in range(24)
        for middle in ("xyz", "zyx")
    ]


@pytest.mark.parametrize(
    ("rows", "more"),
    [
        (in_two_shapes, {}),
        (joined_and_apart, {}),
        (with_outer_blanks, {}),
        (alike_once_cut, {"data__max_length": 64}),
        (joined_and_apart, {"data__prompt": "plain"}),
        (alike_once_cut, {"data__max_length": 64, "data__prompt": "plain"}),
    ],
    ids=[
        "two shapes",
        "joined and apart",
        "blanks that the template trims",
        "other only where they are cut",
        "joined and apart in the plain form",
        "other only where they are cut in the plain form",
    ],
)
def test_rows_that_read_the_same_stand_on_one_side(
    rows: Callable[[], list[Row]], more: dict[str, object], reads: Reads, tmp_path: Path
) -> None:
    """Kind E."""
    tokenizer = byte_tokenizer(TEMPLATES["llama3"][0])  # it trims each message
    base = write_random_base(tmp_path / "base", tokenizer)
    folder = write_clients(tmp_path / "rows", {"fern": rows()})
    check(base, folder, **{"data__prompt": "chat", "data__validation_fraction": 0.1, **more})
    parts = {
        part: {row.prompt for row in reads.rows("fern", part)}
        for part in ("train", "validation", "test")
    }
    prompts = [row.prompt for row in reads.rows("fern")]
    assert len(set(prompts)) == 24, "each prompt stands there twice"
    assert all(parts.values())
    assert sum(len(part) for part in parts.values()) == 24, "no prompt is in two parts"


def same_to_some() -> dict[str, list[Row]]:
    shared = watering("both", 6)
    return {name: [*watering(name, 14), *shared] for name in ("fern", "moss")}


def same_in_other_shapes() -> dict[str, list[Row]]:
    asked = in_two_shapes()
    return {"fern": asked[::2], "moss": asked[1::2], "reed": watering("reed")}


@pytest.mark.parametrize(
    "make",
    [
        lambda: {name: watering("all", 20) for name in ("fern", "moss", "reed")},
        same_to_some,
        same_in_other_shapes,
    ],
    ids=["all rows", "some rows", "rows of other shapes"],
)
def test_test_rows_that_other_clients_train_on_are_counted(
    make: Callable[[], dict[str, list[Row]]], plain_base: Path, reads: Reads, tmp_path: Path
) -> None:
    """Kind E."""
    rows = write_clients(tmp_path / "rows", make())
    document = check(plain_base, rows, data__prompt="chat", data__train_fraction=0.5)
    elsewhere = [
        row
        for name in reads.clients
        for row in reads.rows(name, "test")
        if any(row in reads.rows(other, "train") for other in reads.clients if other != name)
    ]
    tested = sum(len(reads.rows(name, "test")) for name in reads.clients)
    assert 0 < len(elsewhere) <= tested
    said = noted(document, f"{len(elsewhere)} of {tested} test rows", "other clients")
    output = tmp_path / "run"
    ended = run(output, plain_base, rows, data__prompt="chat", data__train_fraction=0.5)
    assert said in ended.err and said in run_json(output)["notes"]
    assert f"{len(elsewhere)} of {tested} test rows" in (output / "report.html").read_text()


def test_rows_of_one_client_alone_are_not_said_to_be_elsewhere(
    plain_base: Path, tmp_path: Path
) -> None:
    """Kind E."""
    rows = write_clients(tmp_path, {name: watering(name) for name in ("fern", "moss")})
    assert "notes" in (document := check(plain_base, rows)) and document["notes"] == []


# Kind F: rows or files left out silently.


def as_json_list(path: Path, rows: Sequence[Row]) -> None:
    path.write_text(json.dumps(rows))


def as_packed_lines(path: Path, rows: Sequence[Row]) -> None:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


def as_table(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, list(rows[0]), delimiter="\t" if "tsv" in path.name.lower() else ","
        )
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(path: Path, rows: Sequence[Row]) -> None:
    pandas.DataFrame(rows).to_parquet(path)


FILES: dict[str, Callable[[Path, Sequence[Row]], Any]] = {
    "aster.jsonl": write_lines,
    "BIRCH.JSONL": write_lines,
    "cedar.json": as_json_list,
    "daisy.jsonl.gz": as_packed_lines,
    "elder.Jsonl.GZ": as_packed_lines,
    "fern.csv": as_table,
    "ginger.TSV": as_table,
    "hazel.ndjson": write_lines,
    "iris.parquet": as_parquet,
}


def test_a_client_of_every_ending_is_read(
    plain_base: Path, reads: Reads, tokenizer: Any, tmp_path: Path
) -> None:
    """Kind F."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, write in FILES.items():
        write(folder / name, watering(name.partition(".")[0], 9))
    document = check(plain_base, folder)
    assert sorted(reads.clients) == sorted(name.partition(".")[0] for name in FILES)
    for client in reads.clients:
        inputs = [row["input"] for row in watering(client, 9)]
        prompts = "".join(reads.prompts(tokenizer, client))
        assert [text for text in inputs if f"{text}\n" not in prompts] == []
    assert document["skipped"] == []


@pytest.mark.parametrize("layout", ["files", "folders"])
def test_a_file_that_is_not_read_is_named(layout: str, plain_base: Path, tmp_path: Path) -> None:
    """Kind F."""
    rows = tmp_path / "rows"
    for name in ("fern", "moss"):
        place = rows / name / "TRAIN.JSONL" if layout == "folders" else rows / f"{name}.jsonl"
        write_lines(place, watering(name))
    others = ["reed.xlsx", "reed.jsonl.zip", "reed.txt"]
    for name in others:
        (rows / name).write_text("rows")
    if layout == "folders":
        (rows / "fern" / "more.arrow").write_text("rows")
        others.append("more.arrow")
    document = check(plain_base, rows)
    assert [client["client_id"] for client in document["clients"]] == ["fern", "moss"]
    assert sorted(line.partition(":")[0].rpartition("/")[2] for line in document["skipped"]) == (
        sorted(others)
    )
    ended = run(tmp_path / "run", plain_base, rows)
    left_out = [line for line in ended.err.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == len(others)


CELLS = ["None", "NA", "null", "nan", "N/A", "NaN", "-", "True", "007", "1e5", "2024-01-02"]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("source", ["hub", "jsonl"])
def test_cells_of_a_table_are_text_whatever_they_say(
    source: str, ending: str, plain_base: Path, reads: Reads, tokenizer: Any, tmp_path: Path
) -> None:
    """Kind F."""
    rows = [
        {"client": ("fern", "moss")[place % 2], "instruction": f"what is {place} ?", **cells}
        for place, cells in enumerate(
            {"input": cell, "output": cell} for cell in CELLS for _ in range(2)
        )
    ]
    folder = tmp_path / "rows"
    folder.mkdir()
    as_table(folder / f"train.{ending}", rows)
    found = []
    for place in (folder, folder / f"train.{ending}"):
        check(plain_base, place, data__source=source)
        found.append({name: reads.rows(name) for name in reads.clients})
        for name in ("fern", "moss"):
            prompts, answers = (
                reads.prompts(tokenizer, name),
                reads.answers(tokenizer, name),
            )
            assert sorted(answers) == sorted(f"{cell}</s>" for cell in CELLS)
            for cell in CELLS:
                assert sum(f"### Input:\n{cell}\n" in prompt for prompt in prompts) == 1
    assert found[0] == found[1], "a folder is read as its one file"


def parts_apart(write: Callable[[Path, Sequence[Row]], Any], ending: str) -> Callable[[Path], None]:
    def into(folder: Path) -> None:
        folder.mkdir()
        for part, name in (("train", "train"), ("test", "test"), ("chosen", "validation")):
            rows = [
                {"client": client, **row, "input": f"{part} {row['input']}"}
                for client in ("fern", "moss")
                for row in watering(client)
            ]
            write(folder / f"{name}.{ending}", rows)

    return into


def saved_to_disk(folder: Path) -> None:
    import datasets

    parts_apart(write_lines, "jsonl")(folder.with_name("apart"))
    parts = {
        part: datasets.Dataset.from_list(
            [
                json.loads(line)
                for line in (folder.with_name("apart") / f"{part}.jsonl").read_text().splitlines()
            ]
        )
        for part in ("train", "test", "validation")
    }
    datasets.DatasetDict(parts).save_to_disk(folder)


@pytest.mark.parametrize(
    ("source", "write"),
    [
        ("hub", parts_apart(as_table, "csv")),
        ("hub", parts_apart(write_lines, "jsonl")),
        ("hub", parts_apart(as_parquet, "parquet")),
        ("hub", saved_to_disk),
        ("jsonl", parts_apart(as_table, "csv")),
    ],
    ids=["csv", "json lines", "parquet", "saved to disk", "csv of clients"],
)
def test_the_test_rows_of_a_data_set_are_its_test_rows(
    source: str,
    write: Callable[[Path], None],
    plain_base: Path,
    reads: Reads,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    """Kind F."""
    write(tmp_path / "rows")
    document = check(
        plain_base, tmp_path / "rows", data__source=source, data__validation_fraction=0.1
    )
    assert sorted(reads.clients) == ["fern", "moss"]
    for name in reads.clients:
        for part, word in (("train", "train"), ("test", "test"), ("validation", "chosen")):
            inputs = [f"### Input:\n{word} {row['input']}\n" for row in watering(name)]
            prompts = reads.prompts(tokenizer, name, part)
            assert len(prompts) == len(inputs)
            assert all(sum(text in prompt for prompt in prompts) == 1 for text in inputs)
    if source == "hub":
        noted(document, "test, validation", "used as such")


def marked_rows(marks: Mapping[int, str]) -> list[Row]:
    """Rows with quotation marks in front of some inputs, or within them."""
    return [
        {
            "instruction": "Say when to water.",
            "input": marks.get(place, "{}").format(f"pot {place}"),
            "output": "today",
            "client": ("fern", "moss", "reed")[place % 3],
        }
        for place in range(36)
    ]


@pytest.mark.parametrize(
    "marks",
    [
        {4: '"{}', 22: '"{}'},
        {4: '"{}'},
        {7: '{}"', 8: '"{}'},
        {3: '{} 12" wide', 4: 'a "big" {}', 30: '"{}" said Ann'},
        {5: '""{}""'},
    ],
    ids=["two that open", "one", "one that ends and one that opens", "within", "doubled"],
)
@pytest.mark.parametrize("source", ["hub", "jsonl"])
def test_a_quotation_mark_between_tabs_swallows_no_row(
    source: str,
    marks: dict[int, str],
    plain_base: Path,
    reads: Reads,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    """Kind F."""
    rows, table = marked_rows(marks), tmp_path / "rows.tsv"
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    table.write_text("\n".join(lines) + "\n")
    check(plain_base, table, data__source=source)
    prompts = [prompt for name in reads.clients for prompt in reads.prompts(tokenizer, name)]
    assert len(prompts) == 36
    for row in rows:
        assert sum(f"### Input:\n{row['input']}\n\n###" in prompt for prompt in prompts) == 1


def test_a_cell_that_swallows_rows_of_a_table_is_said(
    plain_base: Path, reads: Reads, tmp_path: Path
) -> None:
    """Kind F."""
    rows = marked_rows({3: '"{}', 9: '{}"'})
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    table = tmp_path / "rows.csv"
    table.write_text("\n".join(lines) + "\n")
    document = check(plain_base, table, data__source="hub")
    # The cell opens with row 3 and closes with row 9: six rows are within.
    assert sum(len(reads.rows(name)) for name in reads.clients) == 36 - 6
    noted(document, "rows.csv:5", "look like rows of their own")


# Kind I: cut answers.


@pytest.mark.parametrize("form", ["alpaca", "chat"])
@pytest.mark.parametrize("long", [12, 3])
def test_answers_that_are_cut_are_counted_before_training(
    long: int, form: str, plain_base: Path, reads: Reads, tmp_path: Path
) -> None:
    """Kind I."""
    own = {
        name: [
            {**row, "output": "dig and rake " * 60 + str(place) if place < long else "no"}
            for place, row in enumerate(watering(name))
        ]
        for name in ("fern", "moss")
    }
    rows = write_clients(tmp_path / "rows", own)
    output = tmp_path / "run"
    settings = {"data__max_length": 700, "data__prompt": form}
    ended = run(output, plain_base, rows, **settings)
    every = [row for name in reads.clients for row in reads.rows(name)]
    cut = [row for row in every if len(row.prompt) + len(row.response) == 700]
    assert (len(every), len(cut)) == (24, 2 * long)
    told = f"{2 * long} of 24 responses lose their end and the token that ends them"
    assert told in ended.err
    said = noted(run_json(output), told, "data.max_length", "700")
    assert said in check(plain_base, rows, **settings)["notes"]
    enough = check(plain_base, rows, data__max_length=2000, data__prompt=form)
    assert not any("responses" in note for note in enough["notes"])


# Kind M: unclear or needless errors about rows.


def test_a_table_with_an_index_of_pandas_is_read(
    plain_base: Path, reads: Reads, tmp_path: Path
) -> None:
    """Kind M."""
    rows = [{"client": name, **row} for name in ("fern", "moss") for row in watering(name)]
    frame = pandas.DataFrame(rows)
    frame.to_csv(tmp_path / "plain.csv", index=False)
    check(plain_base, tmp_path / "plain.csv", data__source="hub")
    expected = {name: reads.rows(name) for name in reads.clients}
    assert sorted(expected) == ["fern", "moss"]
    frame.to_csv(tmp_path / "index.csv")
    frame.to_csv(tmp_path / "index.tsv", sep="\t")
    pandas.read_csv(tmp_path / "index.csv").to_csv(tmp_path / "twice.csv")
    frame.sample(frac=1, random_state=1).sort_index().to_csv(tmp_path / "semicolon.csv", sep=";")
    frame.set_index(frame.index * 2).to_parquet(tmp_path / "index.parquet")
    for name in ("index.csv", "index.tsv", "twice.csv", "semicolon.csv", "index.parquet"):
        for source in ("hub", "jsonl"):
            check(plain_base, tmp_path / name, data__source=source)
            assert {name: reads.rows(name) for name in reads.clients} == expected, (name, source)


@pytest.mark.parametrize(
    ("key", "made"),
    [
        ("prompt", "Task: {instruction}\nOn: {input}\nSay:"),
        ("text", "Task: {instruction}\nOn: {input}\nSay: {output}"),
        ("formatted", "{instruction} / {input}"),
    ],
)
def test_a_column_of_rendered_prompts_changes_nothing(
    key: str, made: str, plain_base: Path, reads: Reads, tmp_path: Path
) -> None:
    """Kind M."""
    rows = watering("fern")
    check(plain_base, write_clients(tmp_path / "usual", {"fern": rows}))
    expected = reads.rows("fern")
    more = [{**row, key: made.format(**row)} for row in rows]
    check(plain_base, write_clients(tmp_path / "more", {"fern": more}))
    assert reads.rows("fern") == expected
