"""Rows of users' files as examples: the shapes that instruction data comes in.

| shape | keys |
|---|---|
| Alpaca | instruction, output, optional input |
| Dolly | instruction, response, optional context |
| prompt and completion | prompt, completion: two texts, or two lists of messages |
| messages | messages: a list of {"role", "content"} in which an assistant message answers |
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedmira.data.examples import Example
from fedmira.data.problems import Problems

__all__ = ["KEYS", "Row", "example_of", "key_problem", "text_of"]

Row = Mapping[str, Any]
Messages = tuple[tuple[str, str], ...]

KEYS = frozenset(
    {
        "instruction",
        "input",
        "output",
        "context",
        "response",
        "prompt",
        "completion",
        "messages",
        "category",
    }
)
"""Keys that a row of any shape is read by."""

_EXTRAS = ("name", "reasoning_content", "tool_call_id", "tool_calls")
_SHAPES = (
    "instruction and output (input), instruction and response (context), prompt and completion, "
    "or messages"
)
_RENAMED = {
    "instruction": ("question", "query", "request", "task", "problem", "user"),
    "output": (
        "answer",
        "reply",
        "target",
        "label",
        "solution",
        "completion",
        "assistant",
        "result",
    ),
}
"""Our key -> what rows of other shapes often call it, the likeliest first."""


def example_of(row: Row, where: str, problems: Problems) -> Example | None:
    """The example in a row of any known shape, or None with a problem noted.

    Args:
        row: one JSON object or data set row; keys beside those of its shape are not looked at.
        where: file and line, for the problem and for `Example.where`.
    """
    before = len(problems)
    found = {
        key for key, value in row.items() if value is not None
    }  # tables of mixed shapes fill up with nulls
    if "messages" in found:
        turns = _messages_of(row, "messages", where, problems)
        example = _from_messages(turns, row, ("messages",), where, problems)
    elif isinstance(row.get("prompt"), list) or isinstance(row.get("completion"), list):
        turns = _messages_of(row, "prompt", where, problems) + _messages_of(
            row, "completion", where, problems
        )
        example = (
            _from_messages(turns, row, ("prompt", "completion"), where, problems)
            if len(problems) == before
            else None
        )
    elif found & {"prompt", "completion"}:
        example = _from_texts(row, ("prompt", None, "completion"), where, problems)
    elif "instruction" in found and found & {"output", "response"}:
        keys = (
            ("instruction", "input", "output")
            if "output" in found
            else ("instruction", "context", "response")
        )
        example = _from_texts(row, keys, where, problems)
    elif "instruction" in found:
        problems.add(
            f"{where}: missing key 'output' or 'response', found "
            f"{_names(row)}{_renaming(found, ('output',))}"
        )
        return None
    else:
        advice = _renaming(found, ("instruction", "output")) or (
            "; rename the keys of the rows" if row else ""
        )
        problems.add(f"{where}: unknown shape, found {_names(row)}; a row needs {_SHAPES}{advice}")
        return None
    return example if example is not None and _is_usable(example, before, problems) else None


def text_of(row: Row, key: str, where: str, problems: Problems, *, optional: bool = False) -> str:
    """The text under a key; "" when it is not there, with a problem noted unless it is optional."""
    value = row.get(key)
    if value is None:
        if not optional:
            problems.add(key_problem(where, key, row))
        return ""
    if not isinstance(value, str):
        problems.add(f"{where}: {key!r} is of type {type(value).__name__}; must be text")
        return ""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        problems.add(
            f"{where}: {key!r} holds half of a surrogate pair at character "
            f"{error.start + 1}; no tokenizer can encode it"
        )
        return ""
    return value


def key_problem(where: str, key: str, row: Row) -> str:
    """The message for a key that is not there, or null."""
    return f"{where}: missing key {key!r}, found {_names(row)}"


def _renaming(found: Collection[str], wanted: Sequence[str]) -> str:
    """Which keys to rename, where every wanted one has a likely name among those found; else ""."""
    pairs = [
        (next((other for other in _RENAMED[ours] if other in found), ""), ours) for ours in wanted
    ]
    return (
        "; rename " + " and ".join(f"{other!r} to {ours!r}" for other, ours in pairs)
        if all(other for other, _ in pairs)
        else ""
    )


def _from_texts(
    row: Row, keys: tuple[str, str | None, str], where: str, problems: Problems
) -> Example | None:
    before = len(problems)
    instruction = text_of(row, keys[0], where, problems)
    material = text_of(row, keys[1], where, problems, optional=True) if keys[1] else ""
    output = text_of(row, keys[2], where, problems)
    return Example(instruction, material, output, where=where) if len(problems) == before else None


def _from_messages(
    messages: Messages, row: Row, keys: Sequence[str], where: str, problems: Problems
) -> Example | None:
    answers = [i for i, (role, _) in enumerate(messages) if role == "assistant"]
    if not answers or answers[-1] == 0:
        if messages:
            problems.add(
                f"{where}: no assistant message answers another message, found roles "
                f"{', '.join(role for role, _ in messages)}"
            )
        return None
    # What follows the last answer has no response to learn.
    last = answers[-1]
    given = [message for key in keys for message in row[key]][: last + 1]
    extras = tuple(_extra(message) for message in given)
    return Example(
        "",
        "",
        messages[last][1],
        where=where,
        messages=messages[:last],
        extras=extras if any(extras) else (),
        tools=json.dumps(row["tools"], ensure_ascii=False) if row.get("tools") else "",
        untrained=tuple(
            place
            for place, message in enumerate(given)
            if message["role"] == "assistant" and message.get("weight") == 0
        ),
    )


def _extra(message: Mapping[str, Any]) -> str:
    """What a chat template may read of a message beside role and content, as JSON."""
    more = {key: message[key] for key in _EXTRAS if message.get(key) is not None}
    if message.get("content", "") is None:
        more["content"] = None
    return json.dumps(more, ensure_ascii=False) if more else ""


def _messages_of(row: Row, key: str, where: str, problems: Problems) -> Messages:
    value = row.get(key)
    if not isinstance(value, list) or not value:
        problems.add(
            key_problem(where, key, row)
            if value is None
            else f"{where}: {key!r} must be a list of messages that is not empty"
        )
        return ()
    messages = []
    before = len(problems)
    for number, message in enumerate(value, start=1):
        place = f"{where}, {key} {number}"
        if not isinstance(message, Mapping):
            problems.add(
                f"{place}: is of type {type(message).__name__}; must be an object with "
                "'role' and 'content'"
            )
            continue
        called = bool(message.get("tool_calls"))
        messages.append(
            (
                text_of(message, "role", place, problems),
                text_of(message, "content", place, problems, optional=called),
            )
        )
    return tuple(messages) if len(problems) == before else ()


def _is_usable(example: Example, before: int, problems: Problems) -> bool:
    if not example.output.strip() and "tool_calls" not in "".join(example.extras[-1:]):
        problems.add(f"{example.where}: empty response; a row needs text to learn")
    if not example.messages and not (example.instruction.strip() or example.input.strip()):
        problems.add(f"{example.where}: empty prompt; a row needs an instruction")
    return len(problems) == before


def _names(row: Row) -> str:
    return (
        ", ".join(f"{key} (null)" if value is None else str(key) for key, value in row.items())
        or "no keys"
    )
