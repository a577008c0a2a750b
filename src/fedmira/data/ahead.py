"""Rows of several clients encoded together, before each client is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from fedmira.data.encoded import EncodedTurn
from fedmira.data.encoding import ROWS_AT_ONCE, Encoder
from fedmira.data.examples import Example
from fedmira.data.problems import Problems
from fedmira.data.split import Split

__all__ = ["Ahead", "parts_of"]


class Ahead:
    """Encodes the rows of several clients together, as many as the tokenizer takes at a time.

    Clients of a few rows would otherwise cost a call of the tokenizer each, and no file of the
    token cache would be worth while.

    Args:
        encoder: encodes them.
        splits: of all clients, in order.
        problems: collects what is wrong.
    """

    def __init__(self, encoder: Encoder, splits: Sequence[Split], problems: Problems) -> None:
        self._encoder, self._splits, self._problems = encoder, splits, problems
        self._turns: dict[int, list[EncodedTurn]] = {}
        self._end = 0  # of the clients that are encoded

    def parts(self, position: int) -> list[list[EncodedTurn]]:
        """The training, validation and test turns of a client; clients are asked for in order.

        Args:
            position: of the client.
        """
        if position == self._end:
            self._encode()
        return [
            [turn for row in part for turn in self._turns[id(row)]]
            for part in parts_of(self._splits[position])
        ]

    def _encode(self) -> None:
        rows: dict[int, Example] = {}
        while self._end < len(self._splits) and len(rows) < ROWS_AT_ONCE:
            parts = parts_of(self._splits[self._end])
            rows |= {id(row): row for part in parts for row in part}
            self._end += 1
        self._turns = {name: [] for name in rows}
        for turn in self._encoder.turns(list(rows.values()), self._problems):
            self._turns[id(turn.source)].append(turn)


def parts_of(split: Split) -> tuple[tuple[Example, ...], ...]:
    """Training, validation and test rows, in this order.

    Args:
        split: of a client.
    """
    return split.train, split.validation, split.test
