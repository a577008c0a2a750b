"""What a source yields: examples, grouped into the tasks that clients hold."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Example", "RawTask", "Reading", "by_prompt"]


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
    """

    instruction: str
    input: str
    output: str
    where: str = field(default="", compare=False)
    messages: tuple[tuple[str, str], ...] = ()

    @property
    def prompt(self) -> Hashable:
        """Equal for rows that ask the same, whatever the response."""
        return (self.instruction, self.input, self.messages)


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
        skipped: tasks that were left out by a rule, one "name: reason" each.
    """

    tasks: tuple[RawTask, ...]
    skipped: tuple[str, ...] = ()


def by_prompt(rows: Iterable[Example]) -> list[list[Example]]:
    """Rows with the same prompt together, in the order in which each prompt comes first."""
    groups: dict[Hashable, list[Example]] = {}
    for row in rows:
        groups.setdefault(row.prompt, []).append(row)
    return list(groups.values())
