"""Collects the problems of one stage, so that they are reported together."""

from __future__ import annotations

from fedmira.errors import DataError

__all__ = ["MOST_SHOWN", "Problems"]

MOST_SHOWN = 20


class Problems:
    """A list of messages that becomes one `DataError`."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, message: str) -> None:
        """Notes a problem; the stage goes on."""
        self._messages.append(message)

    def raise_if_any(self) -> None:
        """Ends the stage when it had problems.

        Raises:
            DataError: at least one was noted. It shows the first `MOST_SHOWN` and counts the rest.
        """
        if not self._messages:
            return
        shown = self._messages[:MOST_SHOWN]
        if len(self._messages) > MOST_SHOWN:
            shown.append(f"and {len(self._messages) - MOST_SHOWN} more")
        raise DataError(shown)
