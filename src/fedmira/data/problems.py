"""Collects the problems of one stage, so that they are reported together."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedmira.errors import DataError

__all__ = ["MOST_SHOWN", "Problems"]

MOST_SHOWN = 20
_PLACE = re.compile(
    r"(?P<file>.*?)(?:(?P<line>:)|(?P<row> row )|(?P<instance>, instance "
    r"))(?P<number>\d+)(?P<rest>: .*)",
    re.DOTALL,
)
_KINDS = ("line", "row", "instance")
_MOST_PARTS = 5


class Problems:
    """A list of messages that becomes one `DataError`."""

    def __init__(self) -> None:
        self._messages: list[str] = []
        self._of_rows: set[int] = set()

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, message: str) -> None:
        """Notes a problem; the stage goes on."""
        self._messages.append(message)

    def mark_row(self, first: int) -> None:
        """Says that all problems from position `first` on are those of a single row."""
        self._of_rows.update(range(first, len(self._messages)))

    def forgive_rows(self) -> list[str]:
        """Takes back the problems of single rows; what is equal in several rows comes once."""
        taken = [self._messages[place] for place in sorted(self._of_rows)]
        self._messages = [
            message for place, message in enumerate(self._messages) if place not in self._of_rows
        ]
        self._of_rows = set()
        return _grouped(taken)

    def raise_if_any(self) -> None:
        """Ends the stage when it had problems.

        Raises:
            DataError: at least one was noted. What is equal in several lines of a file is said
                once; the first `MOST_SHOWN` are shown and the rest counted.
        """
        if not self._messages:
            return
        messages = _grouped(self._messages)
        shown = messages[:MOST_SHOWN]
        if len(messages) > MOST_SHOWN:
            shown.append(f"and {len(messages) - MOST_SHOWN} more")
        raise DataError(shown)


def _grouped(messages: Sequence[str]) -> list[str]:
    """Join messages that differ in the line, row or instance only.

    The one that stands for them comes at the place of the first.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for message in dict.fromkeys(messages):
        found = _PLACE.fullmatch(message)
        if found is None:
            groups.setdefault((message,), [])
            continue
        kind = next(kind for kind in _KINDS if found[kind])
        groups.setdefault((found["file"], kind, found[kind], found["rest"]), []).append(
            int(found["number"])
        )
    return [_joined(key, numbers) for key, numbers in groups.items()]


def _joined(key: tuple[str, ...], numbers: Sequence[int]) -> str:
    if not numbers:
        return key[0]
    file, kind, mark, rest = key
    if len(numbers) == 1:
        return f"{file}{mark}{numbers[0]}{rest}"
    return f"{file}, {kind}s {_ranges(numbers)}{rest}"


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers in words: "1 to 60", or "2, 5, 7 to 9 and 12 more"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    shown = [
        str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}"
        for part in parts[:_MOST_PARTS]
    ]
    left = sum(part[-1] - part[0] + 1 for part in parts[_MOST_PARTS:])
    return ", ".join(shown) + (f" and {left} more" if left else "")
