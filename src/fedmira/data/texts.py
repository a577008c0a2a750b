"""Single values of a row as text, and what was read of a row."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedmira.data.problems import Problems

__all__ = ["Row", "Seen", "holds", "key_problem", "names_of", "text_of", "value_text"]

Row = Mapping[str, Any]


@dataclass(slots=True)
class Seen:
    """What was read of one row.

    Attributes:
        keys: those whose text reaches the model, or that are read otherwise.
        texts: of these keys; a key that holds one of them again is a copy.
        notes: what was passed over inside of what was read.
    """

    keys: set[str] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def holds(value: Any) -> bool:
    """Whether a value holds text, or anything else that a reader could miss."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(holds(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return any(holds(inner) for inner in value)
    return isinstance(value, bytes)


def text_of(row: Row, key: str, where: str, problems: Problems, *, optional: bool = False) -> str:
    """The text under a key; "" when it is not there, with a problem noted unless it is optional.

    Args:
        row: a row as it was read.
        key: the key of the row.
        where: file and line, or client and row, as messages name it.
        problems: collects what is wrong, with its place.
        optional: whether a missing value is empty text in place of a problem.
    """
    value = row.get(key)
    if value is None:
        if not optional:
            problems.add(key_problem(where, key, row))
        return ""
    if not isinstance(value, str):
        problems.add(f"{where}: {key!r} is of type {type(value).__name__}; must be text")
        return ""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        problems.add(
            f"{where}: {key!r} holds half of a surrogate pair at character "
            f"{error.start + 1}; no tokenizer can encode it"
        )
        return ""
    return value


def value_text(
    row: Row, key: str, where: str, problems: Problems, *, optional: bool = False
) -> str:
    """As `text_of`, where numbers, dates and truth values are taken as their text, too.

    Args:
        row: a row as it was read.
        key: the key of the row.
        where: file and line, or client and row, as messages name it.
        problems: collects what is wrong, with its place.
        optional: whether a missing value is empty text in place of a problem.
    """
    value = row.get(key)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool):
        value = "true" if value else "false"
    elif isinstance(value, int | float | decimal.Decimal):
        value = str(value)
    elif isinstance(value, datetime.date | datetime.time):
        value = value.isoformat()
    return text_of({**row, key: value}, key, where, problems, optional=optional)


def key_problem(where: str, key: str, row: Row) -> str:
    """The message for a key that is not there, or null.

    Args:
        where: file and line, or client and row, as messages name it.
        key: the key of the row.
        row: a row as it was read.
    """
    return f"{where}: missing key {key!r}, found {names_of(row)}"


def names_of(row: Row) -> str:
    """The keys of a row in words."""
    return (
        ", ".join(f"{key} (null)" if value is None else str(key) for key, value in row.items())
        or "no keys"
    )
