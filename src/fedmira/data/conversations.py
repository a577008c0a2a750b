"""Messages of a row, in the forms that chat data comes in, as those that a template renders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmira.data.examples import Example
from fedmira.data.problems import Problems
from fedmira.data.texts import Row, Seen, holds, key_problem, text_of, value_text

__all__ = ["Message", "conversation", "from_json", "history_of", "messages_of", "tools_of"]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""What other forms call a role -> what templates call it."""

_EXTRAS = ("name", "reasoning_content", "thinking", "tool_call_id", "tool_calls")
_READ = frozenset(
    {"role", "from", "content", "value", "weight", "function_call", "refusal", *_EXTRAS}
)
_SPOKEN = frozenset({"text", "reasoning", "thought", "audio", "images", "image"})
"""Keys of a message that are likely meant for the model, and that nothing here reads."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message as a template sees it.

    Attributes:
        extra: its further keys.
        untrained: whether it is not to be learned.
        role: system, user, assistant or tool.
        content: the text; parts are joined.
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    untrained: bool = False


def messages_of(row: Row, key: str, where: str, problems: Problems, seen: Seen) -> list[Message]:
    """The messages under a key; empty with problems noted where one cannot be read.

    Args:
        row: a row as it was read.
        key: the key of the row.
        where: file and line, or client and row, as messages name it.
        problems: collects what is wrong, with its place.
        seen: collects the keys whose text was read.
    """
    value = from_json(row.get(key))
    if not isinstance(value, list) or not value:
        problems.add(
            key_problem(where, key, row)
            if value is None
            else f"{where}: {key!r} must be a list of messages that is not empty"
        )
        return []
    before = len(problems)
    messages = []
    for number, given in enumerate(value, start=1):
        place = f"{where}, {key} {number}"
        if not isinstance(given, Mapping):
            problems.add(
                f"{place}: is of type {type(given).__name__}; must be an object with "
                "'role' and 'content'"
            )
            continue
        messages.append(_message(given, place, problems, seen))
    return messages if len(problems) == before else []


def history_of(row: Row, where: str, problems: Problems, seen: Seen) -> list[Message]:
    """Earlier turns: pairs of a question and its answer, or messages.

    Args:
        row: a row as it was read.
        where: file and line, or client and row, as messages name it.
        problems: collects what is wrong, with its place.
        seen: collects the keys whose text was read.
    """
    value = from_json(row.get("history"))
    if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
        return messages_of(row, "history", where, problems, seen)
    turns: list[Message] = []
    for number, pair in enumerate(value if isinstance(value, list) else [None], start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            problems.add(
                f"{where}, history {number}: must be a pair of a question and its answer, "
                "or a message"
            )
            return []
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(Message(role, value_text({role: text}, role, where, problems)))
    return turns


def tools_of(row: Row, where: str, problems: Problems) -> str:
    """The functions that a row offers, as the text of a JSON list; "" for none.

    Args:
        row: a row as it was read.
        where: file and line, or client and row, as messages name it.
        problems: collects what is wrong, with its place.
    """
    key = "tools" if holds(row.get("tools")) else "functions"
    if not holds(row.get(key)):
        return ""
    value = from_json(row[key])
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        problems.add(f"{where}: {key!r} must be a list of functions")
        return ""
    if key == "functions":
        value = [{"type": "function", "function": each} for each in value]
    return json.dumps(value, ensure_ascii=False)


def conversation(
    turns: Sequence[Message], tools: str, where: str, problems: Problems, seen: Seen
) -> Example | None:
    """The example of a conversation, which ends with its last answer.

    Args:
        turns: the messages, in order.
        tools: the functions it offers, as the text of a JSON list; "" for none.
        where: file and line, or client and row, as messages name it.
        problems: collects what is wrong, with its place.
        seen: collects the keys whose text was read.
    """
    answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers or answers[-1] == 0:
        if turns:
            problems.add(
                f"{where}: no assistant message answers another message, found roles "
                f"{', '.join(turn.role for turn in turns)}"
            )
        return None
    last = answers[-1]
    if any(holds(turn.content) for turn in turns[last + 1 :]):
        # What follows the last answer has no response to learn.
        seen.notes.append("messages after the last answer")
    given = turns[: last + 1]
    untrained = tuple(place for place in answers if turns[place].untrained)
    if len(untrained) == len(answers):
        problems.add(f"{where}: no assistant message is learned; each has the weight 0")
    extras = tuple(
        json.dumps(turn.extra, ensure_ascii=False) if turn.extra else "" for turn in given
    )
    return Example(
        "",
        "",
        turns[last].content,
        where=where,
        messages=tuple((turn.role, turn.content) for turn in given[:-1]),
        extras=extras if any(extras) else (),
        tools=tools,
        untrained=untrained,
    )


def from_json(value: Any) -> Any:
    """A value, or what it holds where it is the text of a JSON list, as in cells of a table."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _message(given: Mapping[str, Any], place: str, problems: Problems, seen: Seen) -> Message:
    role_key = "role" if given.get("role") is not None or "from" not in given else "from"
    role = text_of(given, role_key, place, problems)
    extra = {key: given[key] for key in _EXTRAS if given.get(key) is not None}
    key = "content" if given.get("content") is not None or "value" not in given else "value"
    content = given.get(key)
    if isinstance(given.get("function_call"), Mapping) and "tool_calls" not in extra:
        extra["tool_calls"] = [{"type": "function", "function": dict(given["function_call"])}]
    if role == "function_call":
        role, content, extra = _call(content, place, extra, problems)
        given = {**given, key: content}
    if isinstance(content, list):
        content = _joined(content, place, problems)
        given = {**given, key: content}
    text = text_of(given, key, place, problems, optional="tool_calls" in extra)
    if key in given and given[key] is None:
        extra["content"] = None
    for other in given:
        if other not in _READ and holds(given[other]) and other not in (role_key, key):
            if other in _SPOKEN:
                problems.add(f"{place}: {other!r} would not reach the model; remove it")
            else:
                seen.notes.append(f"{other!r} of messages")
    return Message(
        _ROLES.get(role.lower(), role) if role_key == "from" or role in _ROLES else role,
        text,
        extra,
        given.get("weight") == 0,
    )


def _call(
    content: Any, place: str, extra: dict[str, Any], problems: Problems
) -> tuple[str, str | None, dict[str, Any]]:
    """ShareGPT's call of a function: its value is the text of a JSON object, or of several."""
    try:
        value = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        value = None
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        problems.add(f"{place}: 'function_call' must hold JSON with 'name' and 'arguments'")
        return "assistant", "", extra
    made = [{"type": "function", "function": dict(call)} for call in calls]
    return "assistant", "", {**extra, "tool_calls": made}


def _joined(parts: Sequence[Any], place: str, problems: Problems) -> str:
    """The texts of a content in parts."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            problems.add(
                f"{place}: a part of the type {kind!r} would not reach the model, which reads "
                "text alone; remove it"
            )
    return "".join(texts)
