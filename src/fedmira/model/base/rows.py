"""What training and measuring ask of a row: token ids of a prompt and of its response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Row"]


class Row(Protocol):
    """Token ids of a prompt and of its response (with the end-of-sequence token).

    Neither is empty.
    """

    @property
    def prompt(self) -> Sequence[int]:
        """Tokens that are read."""
        ...

    @property
    def response(self) -> Sequence[int]:
        """Tokens that carry loss."""
        ...
