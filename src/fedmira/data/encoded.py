"""Rows as token ids, and the clients that hold them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from fedmira.data.examples import Example

__all__ = ["HEADER_TOKENS", "ClientData", "EncodedExample", "EncodedTurn", "without_middle"]

HEADER_TOKENS = 16
"""Of the end of a prompt that is cut, so that the header of the answer stays."""


def without_middle(prompt: tuple[int, ...], most: int) -> tuple[int, ...]:
    """A prompt that is too long without its middle, in training and when it is asked alike.

    Args:
        prompt: token ids.
        most: of which so many may stay, 2 or more; the last `HEADER_TOKENS` of them are its end.
    """
    if len(prompt) <= most:
        return prompt
    tail = min(HEADER_TOKENS, most - 1)
    return prompt[: most - tail] + prompt[len(prompt) - tail :]


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One row as tokens; only the response carries loss.

    Attributes:
        prompt: with the leading special tokens that the tokenizer itself adds; never empty.
        response: ends with the end-of-sequence token, or as the chat template ends a turn, unless
            it was cut; never empty.
        advantage: as the row has it; it plays no part in what rows are copies of each other.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    advantage: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class EncodedTurn:
    """A row, or one assistant turn of a conversation, with what became of it.

    Attributes:
        source: the row that it is, or is a turn of.
        last: whether it is the whole row, and no earlier turn of it.
        row: its tokens.
        reading: equal for turns whose prompt reads the same once it is cut, however long their
            responses are.
        reference: what an answer is held against.
        prompt_cut, response_cut: whether `data.max_length` cut it.
        length: tokens before it was cut.
        notes: what was done to it, in words that are equal for equal things.
    """

    source: Example
    last: bool
    row: EncodedExample
    reading: Hashable
    reference: str
    prompt_cut: bool
    response_cut: bool
    length: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClientData:
    """Everything a client trains and is evaluated on.

    Attributes:
        client_id: safe as a folder name.
        references: the test responses, one for each test row: as they were read, or as their
            tokens say where that is another text.
        instruction: the instruction that all training rows share, "" where they differ.
        truncated_prompts, truncated_responses: rows that were cut to `data.max_length`, of all
            parts.
        duplicates: copies of rows that were dropped.
        overlaps: rows that were dropped because their prompt stands in the source's own test or
            validation rows, and turns of conversations that stand on two sides.
        system: the system message that all training rows share, "" where they differ.
        tools: the functions that all training rows offer, as the text of a JSON list, or "".
        conversation: whether the training rows are conversations.
        notes: what was done to how many of the rows.
        task: what the client does; empty where nothing says it.
        category: the group of tasks it belongs to; empty where none is given.
        train: rows, in order, to train on.
        validation: rows to choose settings and checkpoints by.
        test: rows to measure on.
    """

    client_id: str
    task: str
    category: str
    train: tuple[EncodedExample, ...]
    validation: tuple[EncodedExample, ...]
    test: tuple[EncodedExample, ...]
    references: tuple[str, ...]
    instruction: str = ""
    truncated_prompts: int = 0
    truncated_responses: int = 0
    duplicates: int = 0
    overlaps: int = 0
    system: str = ""
    tools: str = ""
    conversation: bool = False
    notes: tuple[tuple[str, int], ...] = ()

    @property
    def rows(self) -> tuple[EncodedExample, ...]:
        """The rows of all three parts."""
        return (*self.train, *self.validation, *self.test)

    @property
    def train_tokens(self) -> int:
        """Prompt and response tokens of all training rows."""
        return sum(len(row.prompt) + len(row.response) for row in self.train)

    @property
    def train_response_tokens(self) -> int:
        """Tokens that carry loss in one pass over the training rows."""
        return sum(len(row.response) for row in self.train)

    @property
    def shared_prompt(self) -> dict[str, Any]:
        """What stands in the prompts of all training rows, as it is saved with the adapter."""
        return {
            "instruction": self.instruction,
            "system": self.system,
            "tools": self.tools,
            "conversation": self.conversation,
        }
