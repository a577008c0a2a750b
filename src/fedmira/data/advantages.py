"""How good each training row is, where its source says so: the numeric key `advantage`."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

from fedmira.data.encoded import ClientData
from fedmira.data.problems import Problems
from fedmira.data.texts import Row, Seen
from fedmira.errors import DataError

__all__ = ["ADVANTAGE", "about_advantages", "advantage_of", "unlike_copies"]

ADVANTAGE = "advantage"
"""The key of a row that holds its advantage."""


def advantage_of(row: Row, where: str, problems: Problems, seen: Seen) -> float | None:
    """The advantage of a row; None where it has none, or one that is no number.

    Tables hold numbers as text, which counts as well. A text that is no number is left to what
    tells of keys that nobody reads.

    Args:
        row: a row as it was read.
        where: file and line, or client and row, as messages name it.
        problems: receives a number that is not finite.
        seen: is told that the key was read.
    """
    value = row.get(ADVANTAGE)
    if isinstance(value, bool):
        seen.notes.append(f"{ADVANTAGE!r} is true or false, and no number")
        return None
    if value is None or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    except OverflowError:
        number = math.inf
    seen.keys.add(ADVANTAGE)
    if not math.isfinite(number):
        problems.add(
            f"{where}: {ADVANTAGE!r} is {number}; must be a finite number (0 weighs a row as one "
            "that has none)"
        )
        return None
    return number


def unlike_copies(rows: Iterable[tuple[Hashable, float | None]]) -> int:
    """How many rows are copies of an earlier one that has another advantage.

    Args:
        rows: what makes a row a copy, and its advantage.
    """
    first: dict[Hashable, float | None] = {}
    return sum(first.setdefault(key, advantage) != advantage for key, advantage in rows)


def about_advantages(
    clients: Sequence[ClientData], temperature: float, *, required: bool = True
) -> list[str]:
    """What is to be said of advantages before training, a sentence each.

    Args:
        clients: all whose rows are here.
        temperature: `local.advantage_temperature`; 0 reads no advantage.
        required: whether it is an error that a temperature is set and no row has an advantage.

    Raises:
        DataError: no training row has one, and it is required.
    """
    total = sum(len(client.train) for client in clients)
    without = {
        client.client_id: sum(row.advantage is None for row in client.train) for client in clients
    }
    lacking = sum(without.values())
    if not temperature:
        if lacking == total:
            return []
        return [
            f"{total - lacking} of {total} training rows have an {ADVANTAGE}, which nothing reads: "
            "local.advantage_temperature is 0"
        ]
    if lacking == total and required:
        raise DataError(
            f"local.advantage_temperature is {temperature:g}, but no training row has the key "
            f"{ADVANTAGE!r}, so that nothing would be weighted; name its column in "
            f"data.columns.{ADVANTAGE}, or set the temperature to 0"
        )
    if not lacking:
        return []
    whose = [client.client_id for client in clients if without[client.client_id]]
    return [
        f"{lacking} of {total} training rows have no {ADVANTAGE} and are weighted as rows of "
        f"{ADVANTAGE} 0 (clients {', '.join(whose[:8])}"
        f"{f' and {len(whose) - 8} more' if len(whose) > 8 else ''})"
    ]
