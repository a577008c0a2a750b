"""What a node says of itself, and what no node can say."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from fedmira.data import ClientSummary, read_summary
from fedmira.errors import WireError
from fedmira.shown import cut, plain
from fedmira.wire import Encoded, text

__all__ = ["Identity"]

_MOST_ROWS, _MOST_TOKENS, _LONGEST_NAME = 10**9, 10**13, 200
"""What a client can say of itself: rows of each part, tokens, characters of task and category."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a node says of itself.

    Attributes:
        party: its client, and what is told of the client's rows.
        base_sha256: of the base's parameters.
        tokenizer_sha256: of the tokenizer.
    """

    party: ClientSummary
    base_sha256: str
    tokenizer_sha256: str

    @classmethod
    def of(cls, message: Encoded) -> Identity:
        """Read a node's answer.

        Raises:
            WireError: it is none; the node may run another version.
        """
        try:
            party = read_summary(json.loads(text(message.header, "party")))
        except (ValueError, RecursionError) as error:
            raise WireError(
                f"its answer is no identity ({error}); install the server's version of "
                "fedmira on the node"
            ) from error
        if problem := _said_problem(party):
            raise WireError(f"its answer is no identity ({problem})")
        return cls(party, text(message.header, "base"), text(message.header, "tokenizer"))


def _said_problem(party: ClientSummary) -> str:
    """What no client can say of itself; "" where it may be so.

    Names come from elsewhere and stand on pages and terminals.
    """
    for name, value in asdict(party).items():
        if isinstance(value, str):
            if len(value) > _LONGEST_NAME or plain(value) != value:
                shown = plain(cut(value, 80))
                return (
                    f"{name} is {shown!r}; must be at most {_LONGEST_NAME} characters that can be "
                    "seen"
                )
        elif value > (_MOST_ROWS if name.endswith("_rows") else _MOST_TOKENS):
            most = _MOST_ROWS if name.endswith("_rows") else _MOST_TOKENS
            return f"{name} is {str(value)[:40]}; must be at most {most}"
    return ""
