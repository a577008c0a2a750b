"""What a source yields: examples, grouped into the tasks that clients hold."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

__all__ = ["Example", "RawTask", "Reading", "by_prompt", "turns_of"]


@dataclass(frozen=True, slots=True)
class Example:
    """One supervised row: an instruction, an optional input and the response to learn.

    Attributes:
        instruction: what to do; shared by all rows of a task in most sources.
        input: the material the instruction is about; may be empty.
        output: the response; only its tokens carry loss.
        where: file and line (or instance) the row came from, for error messages.
        messages: a conversation in place of instruction and input: (role, content) pairs that end
            before the response. Empty for instruction rows.
        extras: further keys of each message as the text of a JSON object, "" where a message has
            none; the last is the response's. Empty where no message has any.
        tools: the functions that the assistant may call, as the text of a JSON list; "" for none.
        untrained: positions of assistant messages that are not to be learned; the response stands
            at position len(messages).
        advantage: how much better than usual the response is; None where the source does not say.
            Rows that differ in nothing else are copies.
    """

    instruction: str
    input: str
    output: str
    where: str = field(default="", compare=False)
    messages: tuple[tuple[str, str], ...] = ()
    extras: tuple[str, ...] = ()
    tools: str = ""
    untrained: tuple[int, ...] = ()
    advantage: float | None = field(default=None, compare=False)

    @property
    def prompt(self) -> Hashable:
        """Equal for rows that ask the same, whatever the response."""
        return (self.instruction, self.input, self.messages, self.extras[:-1], self.tools)


@dataclass(frozen=True, slots=True)
class RawTask:
    """The rows of one task as read from a source, before they are given to clients and split.

    Attributes:
        name: the task's name, unique within a source.
        category: the family the task belongs to ("" where the source knows none).
        examples: training rows, or all rows when `test` is None.
        test: rows that the source itself sets aside for testing, or None to split `examples`.
        validation: rows that the source itself sets aside for validation, or None to take them from
            `examples`.
    """

    name: str
    category: str
    examples: Sequence[Example]
    test: Sequence[Example] | None = None
    validation: Sequence[Example] | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader found in its source.

    Attributes:
        tasks: in the order of the source; `data.clients` keeps the first so many.
        skipped: tasks, files and rows that were left out, one "name: reason" each.
        notes: what else is to be said of the rows, a sentence each.
    """

    tasks: tuple[RawTask, ...]
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def by_prompt(
    rows: Iterable[Example], same: Mapping[Hashable, Hashable] | None = None
) -> list[list[Example]]:
    """Rows with the same prompt together, in the order in which each prompt comes first.

    Args:
        rows: of one client.
        same: prompt -> the prompt it counts as, for prompts that differ and read the same.
    """
    groups: dict[Hashable, list[Example]] = {}
    for row in rows:
        key = row.prompt
        groups.setdefault(same.get(key, key) if same else key, []).append(row)
    return list(groups.values())


def turns_of(row: Example, train_on: str) -> list[Example]:
    """A row for each assistant turn that is learned, in their order; each ends with its turn.

    Args:
        row: an instruction row gives itself.
        train_on: "all" assistant turns of a conversation, or the "last".
    """
    last = len(row.messages)
    turns = []
    if train_on == "all":
        asked = False
        for position, (role, content) in enumerate(row.messages):
            calls = bool(row.extras and "tool_calls" in row.extras[position])
            if role == "assistant" and asked and position not in row.untrained:
                if content.strip() or calls:
                    turns.append(_until(row, position))
            asked |= role not in ("system", "developer", "assistant")
    return turns if last in row.untrained else [*turns, row]


def _until(row: Example, position: int) -> Example:
    return replace(
        row,
        output=row.messages[position][1],
        messages=row.messages[:position],
        extras=row.extras[: position + 1],
        untrained=(),
    )
