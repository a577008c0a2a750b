"""Shapes of rows: every text reaches the model, or it is named."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.config import DataSettings
from fedmira.data import Example
from fedmira.data.problems import Problems
from fedmira.data.rows import RowReader
from fedmira.errors import DataError


def read(row: dict[str, Any], **keys: Any) -> tuple[Example | None, list[str], str]:
    """The example of a row, its notes, and its problems as one text."""
    problems = Problems()
    reader = RowReader(DataSettings(source="jsonl", path="x", bad_rows="error", **keys), problems)
    example = reader.example(row, "f:1")
    _, notes = reader.finish()
    try:
        problems.raise_if_any()
    except DataError as error:
        return example, notes, "\n".join(error.problems)
    return example, notes, ""


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "i", "input": "m", "response": "o"}, Example("i", "m", "o")),
        ({"question": "q", "answer": "a"}, Example("q", "", "a")),
        ({"question": "q", "context": "c", "answer": "a"}, Example("q", "c", "a")),
        ({"instruction": "i", "question": "q", "answer": "a"}, Example("i", "q", "a")),
        (
            {"instruction": "i", "question": "q", "context": "c", "answer": "a"},
            Example("i", "c\n\nq", "a"),
        ),
        ({"input": "m", "output": "o"}, Example("m", "", "o")),
        ({"instruction": "i", "output": 7}, Example("i", "", "7")),
        ({"instruction": "i", "output": True}, Example("i", "", "true")),
        ({"instruction": "i", "output": date(2026, 5, 1)}, Example("i", "", "2026-05-01")),
        (
            {"instruction": "i", "input": "m", "output": "o", "prompt": "Below: m"},
            Example("i", "m", "o"),
        ),
        (
            {"instruction": "i", "output": "o", "system": "s", "history": [["a", "b"]]},
            Example(
                "",
                "",
                "o",
                messages=(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "i")),
            ),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ],
                "system": "s",
            },
            Example("", "", "a", messages=(("system", "s"), ("user", "q"))),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "q"}]},
                    {"role": "assistant", "content": "a"},
                ]
            },
            Example("", "", "a", messages=(("user", "q"),)),
        ),
    ],
)
def test_a_row_is_read_by_its_fullest_shape(row: dict[str, Any], expected: Example) -> None:
    example, _, problem = read(row)
    assert (example, problem) == (expected, "")


def test_a_constant_instruction_makes_the_question_the_input() -> None:
    example, _, _ = read({"question": "q", "answer": "a"}, instruction="Answer.")
    assert example == Example("Answer.", "q", "a")


def test_tools_calls_and_weights_are_kept_and_need_a_template() -> None:
    call = {"type": "function", "function": {"name": "desk", "arguments": {"q": 1}}}
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "r"},
            {"role": "assistant", "content": "a"},
        ],
        "tools": [{"type": "function", "function": {"name": "desk"}}],
    }
    example, _, _ = read(row, prompt="chat")
    assert example is not None and example.untrained == (1,)
    assert json.loads(example.extras[1])["tool_calls"] == [call]
    assert json.loads(example.tools) == row["tools"]
    assert "set data.prompt to 'chat'" in read(row)[2]


def test_text_that_is_likely_part_of_the_task_is_an_error_and_other_text_is_told() -> None:
    row = {"instruction": "i", "output": "o", "choices": ["a", "b"], "source": "web", "id": 3}
    assert "the text of 'choices' would not reach the model" in read(row)[2]
    example, notes, problem = read(row, ignore=("choices",))
    assert example is not None and not problem
    assert notes == ["not read, their text reaches no model: source (1 rows)"]


def test_few_unusable_rows_are_left_out_and_named() -> None:
    problems = Problems()
    reader = RowReader(DataSettings(source="jsonl", path="x"), problems)
    for number in range(1, 101):
        reader.example({"instruction": "i", "output": "" if number == 7 else "o"}, f"f:{number}")
    skipped, _ = reader.finish()
    assert not len(problems)
    assert skipped == ["1 of 100 rows are unusable: f:7: empty response; a row needs text to learn"]
    reader.example({"instruction": "i", "output": ""}, "f:101")
    reader.example({"instruction": "i", "output": ""}, "f:102")
    reader.finish()
    assert len(problems) == 3  # the two rows, and what to do about them


_TEXT = st.text("abcdefg", min_size=3, max_size=8).map(lambda text: f"{text}x")
_TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": _TEXT},
    optional={"thinking": _TEXT, "mood": _TEXT},
)
_VALUES = st.one_of(_TEXT, st.lists(_TURN, min_size=1, max_size=4), st.none())
_KEYS = st.sampled_from(
    "instruction input output context response question answer prompt completion messages "
    "system history conversations tools query source".split()
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(_KEYS, _VALUES, max_size=6))
def test_every_text_reaches_the_model_or_its_key_is_named(row: dict[str, Any]) -> None:
    example, notes, problem = read(row)
    if problem or example is None:
        return
    told = " ".join(notes)
    reached = "\n".join(
        [example.instruction, example.input, example.output, example.tools, *example.extras]
        + [text for _, text in example.messages]
    )
    for key, value in row.items():
        if isinstance(value, str):
            assert value in reached or key in told
        elif isinstance(value, list):
            for turn in value:
                for inner, text in turn.items():
                    assert (
                        inner == "role"
                        or text in reached
                        or key in told
                        or f"'{inner}' of messages" in told
                        or "after the last answer" in told
                    )
