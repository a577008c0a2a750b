"""More inputs of the kinds that `test_rows.py` is about, which nobody reported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.templates import TEMPLATES, byte_tokenizer
from field.inputs import (
    Reads,
    call,
    chat_ids,
    check,
    noted,
    options,
    refused,
    watering,
    write_clients,
    write_lines,
    write_random_base,
)

CLIENTS = ("fern", "moss")
HEARING = (
    "{% if tools %}<|system|>{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}:"
    "{{ c.function.arguments | tojson }}]{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that writes functions and their calls."""
METER = {"name": "read_meter", "parameters": {"pot": {}}}
CALLED = {"name": "read_meter", "arguments": {"pot": 4}}


def two_clients(folder: Path, row: Mapping[str, str], count: int = 10) -> Path:
    """Two clients whose rows have a number of their own wherever {n} stands."""
    return write_clients(
        folder,
        {
            client: [
                {key: value.format(n=f"{client} {place}") for key, value in row.items()}
                for place in range(count)
            ]
            for client in CLIENTS
        },
    )


def test_columns_of_ones_own_take_the_context_with_them(
    tmp_path: Path, plain_base: Path, tokenizer: Any, reads: Reads
) -> None:
    """Kind A."""
    rows = two_clients(
        tmp_path / "rows", {"ask": "How much light?", "context": "shelf {n}.", "say": "half shade"}
    )
    check(plain_base, rows, data__columns__instruction="ask", data__columns__output="say")
    for client in CLIENTS:
        prompts = reads.prompts(tokenizer, client)
        for place in range(10):
            assert sum(f"shelf {client} {place}." in prompt for prompt in prompts) == 1
        assert all("How much light?" in prompt for prompt in prompts)


def test_a_constant_instruction_leaves_no_question_out(
    tmp_path: Path, plain_base: Path, tokenizer: Any, reads: Reads
) -> None:
    """Kind A."""
    rows = two_clients(
        tmp_path / "rows", {"question": "Is {n} dry?", "context": "rain {n}.", "answer": "yes"}
    )
    check(plain_base, rows, data__instruction="Answer as a gardener.")
    for place in range(10):
        texts = ("Answer as a gardener.", f"rain fern {place}.", f"Is fern {place} dry?")
        prompts = reads.prompts(tokenizer, "fern")
        assert sum(all(text in prompt for text in texts) for prompt in prompts) == 1


def test_a_key_that_one_gives_up_is_read_by_nobody_and_told_to_nobody(
    tmp_path: Path, plain_base: Path, tokenizer: Any, reads: Reads
) -> None:
    """Kind A."""
    rows = two_clients(
        tmp_path / "rows", {"instruction": "Light {n}?", "passage": "a draft", "output": "little"}
    )
    refused(call("check", *options(plain_base, rows)), "the text of 'passage'", "data.ignore")
    given = check(plain_base, rows, data__ignore=["passage"])
    assert given["notes"] == []
    assert not any("a draft" in prompt for prompt in reads.prompts(tokenizer, "fern"))


def test_a_column_of_remarks_is_told_with_its_rows(tmp_path: Path, plain_base: Path) -> None:
    """Kind A."""
    rows = two_clients(
        tmp_path / "rows", {"instruction": "Light {n}?", "remark": "checked", "output": "little"}
    )
    noted(check(plain_base, rows), "reaches no model", "remark (20 rows)")


def metered(place: int, called: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A row in which the assistant calls a function before it answers."""
    return {
        "messages": [
            {"role": "user", "content": f"Is pot {place} dry?"},
            {"role": "assistant", **called},
            {"role": "tool", "content": "humidity 12"},
            {"role": "assistant", "content": "yes, dry"},
        ],
        **more,
    }


def test_calls_and_functions_under_their_older_keys_reach_the_template(
    tmp_path: Path, reads: Reads
) -> None:
    """Kind A."""
    hearing = byte_tokenizer(HEARING)
    base = write_random_base(tmp_path / "base", hearing)
    older = {"content": "", "function_call": CALLED}
    rows = {"fern": [metered(place, older, functions=[METER]) for place in range(8)]}
    check(base, write_clients(tmp_path / "rows", rows), data__prompt="chat")
    newer = {"content": "", "tool_calls": [{"type": "function", "function": CALLED}]}
    tools = [{"type": "function", "function": METER}]
    expected = {
        tuple(chat_ids(hearing, metered(place, newer)["messages"][:stop], tools=tools))
        for place in range(8)
        for stop in (2, 4)
    }
    assert {(*row.prompt, *row.response) for row in reads.rows("fern")} == expected
    assert sum("[read_meter:" in said for said in reads.answers(hearing, "fern")) == 8


def test_a_message_that_the_template_leaves_out_is_refused(
    tmp_path: Path, plain_base: Path
) -> None:
    """Kind A."""
    deaf = TEMPLATES["chatml"][0].replace("in messages", "in messages if m.role != 'tool'")
    base = write_random_base(tmp_path / "base", byte_tokenizer(deaf))
    said = {"content": "I look."}
    rows = write_clients(tmp_path / "rows", {"fern": [metered(place, said) for place in range(8)]})
    refused(call("check", *options(base, rows, data__prompt="chat")), "a tool message")
    assert check(plain_base, rows, data__prompt="chat")["clients"]


def spaced(client: str, count: int) -> list[dict[str, Any]]:
    """Each question twice, the second time with blanks that a trimming template takes away."""
    return [
        {"instruction": f"{blank}Is {client} {place} dry?{blank}", "output": "yes"}
        for place in range(count)
        for blank in ("", "  ")
    ]


def test_test_rows_of_the_source_that_read_like_training_rows_are_not_trained(
    tmp_path: Path, reads: Reads
) -> None:
    """Kind E."""
    base = write_random_base(tmp_path / "base", byte_tokenizer(TEMPLATES["gemma"][0]))
    for client in CLIENTS:
        rows = spaced(client, 12)
        write_lines(tmp_path / "rows" / client / "train.jsonl", rows[::2])
        write_lines(tmp_path / "rows" / client / "test.jsonl", rows[1:8:2])
    for summary in check(base, tmp_path / "rows", data__prompt="chat")["clients"]:
        assert (summary["train_rows"], summary["test_rows"], summary["overlaps"]) == (8, 4, 4)
    train, test = ({row.prompt for row in reads.rows("fern", part)} for part in ("train", "test"))
    assert not train & test


def test_rows_that_read_the_same_at_two_clients_are_counted(tmp_path: Path, reads: Reads) -> None:
    """Kind E."""
    base = write_random_base(tmp_path / "base", byte_tokenizer(TEMPLATES["llama3"][0]))
    common = watering("all", 20)
    rows = {
        "fern": [*common, *watering("fern", 10)],
        "moss": [{**row, "input": row["input"] + " "} for row in common],
        "palm": watering("palm", 10),
    }
    document = check(base, write_clients(tmp_path / "rows", rows), data__prompt="chat")
    trained = {name: set(reads.rows(name, "train")) for name in reads.clients}
    tested = [(name, row) for name in reads.clients for row in reads.rows(name, "test")]
    found = sum(
        any(row in own for other, own in trained.items() if other != name) for name, row in tested
    )
    assert 0 < found < len(tested)
    noted(document, f"{found} of {len(tested)} test rows", "training rows of other clients")
