"""Rows of users as examples: the shapes that instruction data comes in.

| shape | keys |
|---|---|
| instruction | instruction, question, prompt; input, context; output, response, answer |
| with turns before | the same, and system, history (pairs, or messages) |
| prompt and completion | two texts, or two lists of messages |
| messages | messages or conversations: role and content, or from and value; beside them tools |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from fedmira.config import DataSettings
from fedmira.data.advantages import ADVANTAGE, advantage_of
from fedmira.data.conversations import (
    Message,
    conversation,
    from_json,
    history_of,
    messages_of,
    tools_of,
)
from fedmira.data.examples import Example
from fedmira.data.problems import Problems
from fedmira.data.texts import Row, Seen, holds, key_problem, names_of, text_of, value_text

__all__ = ["KEYS", "Row", "RowReader", "example_of", "key_problem", "text_of"]

_CHATS = ("messages", "conversations", "conversation")
_ASKS = ("instruction", "question", "prompt")
_MATERIALS = ("input", "context")
_ANSWERS = ("output", "response", "answer", "completion")
_SYSTEMS = ("system", "system_prompt", "system_message")
_AROUND = (*_SYSTEMS, "history", "tools", "functions")

KEYS = frozenset((*_CHATS, *_ASKS, *_MATERIALS, *_ANSWERS, *_AROUND, "category", ADVANTAGE))
"""Keys that a row of any shape is read by."""

_LIKELY = frozenset(
    {*_CHATS, *_ASKS, *_MATERIALS, *_AROUND}
    | {"query", "passage", "document", "choices", "options", "images", "image", "audio"}
)
"""Keys whose text is likely part of the task: where it reaches nobody, the row is refused."""

_SHAPES = (
    "instruction and output (input), instruction and response (context), prompt and completion, "
    "question and answer, or messages"
)
_RENAMED = {
    "instruction": ("query", "request", "task", "problem", "user", "text", "sentence"),
    "output": ("reply", "target", "label", "solution", "assistant", "result"),
}
"""Our key -> what rows of other shapes often call it, the likeliest first."""

_MOST_NAMED = 8


class RowReader:
    """Reads the rows of one source and keeps account of what of them reaches nobody.

    Attributes:
        was_blank: whether the row that was read last had no value at all.
    """

    def __init__(self, settings: DataSettings, problems: Problems) -> None:
        """Begins without rows.

        Args:
            settings: columns, the constant instruction, and what becomes of unusable rows.
            problems: receives what is wrong with single rows.
        """
        self.was_blank = False
        self._settings = settings
        self._problems = problems
        self._columns = {
            ours: theirs for ours, theirs in settings.columns.model_dump().items() if theirs
        }
        self._unread: Counter[str] = Counter()
        self._passed: Counter[str] = Counter()
        self._rows = 0
        self._bad = 0
        self._blank = 0

    def example(self, row: Row, where: str) -> Example | None:
        """The example in a row, or None where the row is unusable or blank.

        Args:
            row: a row as it was read.
            where: file and line, or client and row, as messages name it.
        """
        if row and not any(value is not None and value != "" for value in row.values()):
            self._blank += 1
            self.was_blank = True
            return None
        self.was_blank = False
        self._rows += 1
        before, seen = len(self._problems), Seen()
        named = self._named(row, where)
        example = example_of(
            named, where, self._problems, seen=seen, instruction=self._settings.instruction
        )
        if example is not None:
            advantage = advantage_of(named, where, self._problems, seen)
            example = replace(example, advantage=advantage)
            self._account(named, where, example, seen)
        if len(self._problems) > before:
            self._bad += 1
            self._problems.mark_row(before)
            return None
        return example

    def finish(self) -> tuple[list[str], list[str]]:
        """What was left out and what is to be said, once all rows are read.

        Where no more rows are unusable than `data.bad_rows_share`, they are no problems any more.
        """
        skipped: list[str] = []
        limit = self._settings.bad_rows_share
        if self._bad and self._settings.bad_rows == "skip":
            if self._bad <= limit * self._rows:
                lines = self._problems.forgive_rows()
                shown = "; ".join(lines[:_MOST_NAMED])
                more = f"; and {len(lines) - _MOST_NAMED} more" if len(lines) > _MOST_NAMED else ""
                skipped.append(f"{self._bad} of {self._rows} rows are unusable: {shown}{more}")
            elif self._bad <= 0.1 * self._rows:
                self._problems.add(
                    f"{self._bad} of {self._rows} rows are unusable, and data.bad_rows_share "
                    f"({limit:g}) leaves out fewer; mend them, or raise it"
                )
        if self._blank:
            skipped.append(f"{self._blank} rows are blank")
        notes = []
        if self._unread:
            keys = ", ".join(f"{key} ({count} rows)" for key, count in self._unread.most_common())
            notes.append(f"not read, their text reaches no model: {keys}")
        notes += [f"not read in {count} rows: {note}" for note, count in self._passed.items()]
        return skipped, notes

    def _named(self, row: Row, where: str) -> Row:
        """A row under our names for its columns."""
        if not self._columns:
            return row
        missing = [column for column in self._columns.values() if column not in row]
        for column in missing:
            self._problems.add(f"{key_problem(where, column, row)}; data.columns names it")
        taken = set(self._columns.values())
        rest = {key: value for key, value in row.items() if key not in taken}
        given = {ours: row.get(column) for ours, column in self._columns.items()}
        # Another column may have one of our names: it is told like any other that is not read.
        return {**{f"{key}": value for key, value in rest.items() if key not in given}, **given} | {
            f"{key} (column)": value for key, value in rest.items() if key in given
        }

    def _account(self, row: Row, where: str, example: Example, seen: Seen) -> None:
        """Tells every key with text that was not read."""
        self._passed.update(set(seen.notes))
        ignored = {*seen.keys, "category", self._settings.column, *self._settings.ignore}
        for key, value in row.items():
            if key in ignored or not holds(value):
                continue
            copied = isinstance(value, str) and any(
                text and (text in value or value.strip() in text) for text in seen.texts
            )
            if key in _LIKELY and not copied:
                self._problems.add(
                    f"{where}: the text of {key!r} would not reach the model; give it a place with "
                    f"data.columns, or drop it with data.ignore = [{key!r}]"
                )
            elif not (isinstance(value, str) and _is_number(value)):
                self._unread[key] += 1
        if self._settings.prompt != "chat" and (example.tools or _calls(example)):
            self._problems.add(
                f"{where}: tools and tool_calls reach the model through a chat template alone; set "
                "data.prompt to 'chat'"
            )


def example_of(
    row: Row, where: str, problems: Problems, *, seen: Seen | None = None, instruction: str = ""
) -> Example | None:
    """The example in a row of any known shape, or None with a problem noted.

    Args:
        row: one JSON object or data set row.
        where: file and line, for the problem and for `Example.where`.
        problems: receives what is wrong with the row.
        seen: is told which keys were read.
        instruction: of all rows that have none.
    """
    before = len(problems)
    seen = Seen() if seen is None else seen
    found = {
        key for key, value in row.items() if value is not None
    }  # tables of mixed shapes fill up with nulls
    chat = next((key for key in _CHATS if isinstance(from_json(row.get(key)), list)), None)
    if chat is None and "messages" in found:
        chat = "messages"
    if chat is not None:
        turns = messages_of(row, chat, where, problems, seen)
        seen.keys.add(chat)
        example = _around(turns, row, where, problems, seen) if turns else None
    elif isinstance(row.get("prompt"), list) or isinstance(row.get("completion"), list):
        turns = [
            *_side(row, "prompt", "user", where, problems, seen),
            *_side(row, "completion", "assistant", where, problems, seen),
        ]
        example = _around(turns, row, where, problems, seen) if len(problems) == before else None
    else:
        example = _from_texts(row, found, instruction, where, problems, seen)
    if example is None or len(problems) > before:
        return None
    seen.texts += [text for _, text in example.messages]
    seen.texts += [example.instruction, example.input, example.output]
    return example if _is_usable(example, before, problems) else None


def _side(
    row: Row, key: str, role: str, where: str, problems: Problems, seen: Seen
) -> list[Message]:
    """Messages under a key, of which a text is one."""
    seen.keys.add(key)
    if isinstance(row.get(key), str):
        return [Message(role, text_of(row, key, where, problems))]
    return messages_of(row, key, where, problems, seen)


def _around(
    turns: Sequence[Message], row: Row, where: str, problems: Problems, seen: Seen
) -> Example | None:
    """A conversation with what stands beside it: the system's text, earlier turns, tools."""
    head: list[Message] = []
    system = next((key for key in _SYSTEMS if holds(row.get(key))), None)
    if system is not None and all(turn.role != "system" for turn in turns):
        head.append(Message("system", text_of(row, system, where, problems)))
        seen.keys.add(system)
    if holds(row.get("history")):
        head += history_of(row, where, problems, seen)
        seen.keys.add("history")
    tools = tools_of(row, where, problems)
    if tools:
        seen.keys.add("tools" if holds(row.get("tools")) else "functions")
    return conversation([*head, *turns], tools, where, problems, seen)


def _from_texts(
    row: Row, found: set[str], constant: str, where: str, problems: Problems, seen: Seen
) -> Example | None:
    answer = _first(row, _ANSWERS)
    if constant and not _given(row.get("instruction")):
        row, found = {**row, "instruction": constant}, {*found, "instruction"}
    ask = _ask_of(row, found)
    if ask is None and answer in ("output", "response", "answer") and _given(row.get("input")):
        ask = "input"
    if ask is None or answer is None:
        problems.add(_shape_problem(where, row, found, ask))
        return None
    before = len(problems)
    instruction = value_text(row, ask, where, problems)
    # Beside an instruction, a prompt is its rendering; without one it may be all there is to ask.
    others = [*_MATERIALS, *(["question"] if ask == "instruction" else [])]
    if constant and row["instruction"] == constant:
        others.append("prompt")
    keys = [key for key in others if key != ask and _given(row.get(key))]
    if ask == "prompt":
        keys = [key for key in keys if str(row[key]) not in instruction]
    texts = {key: value_text(row, key, where, problems) for key in keys}
    if texts:
        # The question follows what it is about.
        material = "\n\n".join(texts[key] for key in sorted(texts, key=_place))
    else:
        blank = next((row[key] for key in _MATERIALS if isinstance(row.get(key), str)), "")
        material = "" if ask in ("input", "prompt") else blank
    output = value_text(row, answer, where, problems)
    seen.keys |= {ask, answer, *keys}
    if len(problems) > before:
        return None
    if not any(holds(row.get(key)) for key in _AROUND):
        return Example(instruction, material, output, where=where)
    asked = "\n\n".join(text for text in (instruction, material) if text)
    if not asked.strip():
        problems.add(f"{where}: empty prompt; a row needs an instruction")
        return None
    turns = [Message("user", asked), Message("assistant", output)]
    return _around(turns, row, where, problems, seen)


def _place(key: str) -> int:
    return ("context", "input", "prompt", "question").index(key)


def _given(value: Any) -> bool:
    """Whether a key of the task has a value: text, a number, a date."""
    return value is not None and not (isinstance(value, str | list | dict) and not holds(value))


def _first(row: Row, keys: Sequence[str]) -> str | None:
    """The first key with a value, else the first that is there at all."""
    for given in (_given, lambda value: value is not None):
        for key in keys:
            if given(row.get(key)):
                return key
    return None


def _ask_of(row: Row, found: Collection[str]) -> str | None:
    """The key of the task: the instruction wherever there is one, even a blank one."""
    if "instruction" in found:
        return "instruction"
    return _first(row, _ASKS)


def _shape_problem(where: str, row: Row, found: Collection[str], ask: str | None) -> str:
    if ask == "instruction":
        renaming = _renaming(found, ("output",))
        return f"{where}: missing key 'output' or 'response', found {names_of(row)}{renaming}"
    if ask == "prompt":
        return key_problem(where, "completion", row)
    if ask == "question":
        return key_problem(where, "answer", row)
    if "completion" in found:
        return key_problem(where, "prompt", row)
    advice = _renaming(found, ("instruction", "output")) or (
        "; name the columns in data.columns" if row else ""
    )
    return f"{where}: unknown shape, found {names_of(row)}; a row needs {_SHAPES}{advice}"


def _renaming(found: Collection[str], wanted: Sequence[str]) -> str:
    """What to set data.columns to, where every wanted key has a likely name among those found."""
    pairs = [
        (next((other for other in _RENAMED[ours] if other in found), ""), ours) for ours in wanted
    ]
    inner = ", ".join(f'{ours} = "{other}"' for other, ours in pairs)
    return f"; set data.columns = {{{inner}}}" if all(other for other, _ in pairs) else ""


def _is_usable(example: Example, before: int, problems: Problems) -> bool:
    if not example.output.strip() and "tool_calls" not in "".join(example.extras[-1:]):
        problems.add(f"{example.where}: empty response; a row needs text to learn")
    if not example.messages and not (example.instruction.strip() or example.input.strip()):
        problems.add(f"{example.where}: empty prompt; a row needs an instruction")
    return len(problems) == before


def _calls(example: Example) -> bool:
    return any("tool_calls" in extra for extra in example.extras)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
