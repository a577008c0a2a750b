"""Values of a message's header, which come from elsewhere and are checked before they are used."""

from __future__ import annotations

from collections.abc import Mapping

from fedmira.errors import WireError

__all__ = ["LONGEST_TEXT", "number", "text", "whole_number"]

LONGEST_TEXT = 500
"""Characters of a text of the other end that are kept and shown."""


def text(header: Mapping[str, object], name: str) -> str:
    """A text of a header.

    Args:
        header: as it was read.
        name: its key.

    Raises:
        WireError: it is missing or no text.
    """
    value = header.get(name)
    if not isinstance(value, str):
        raise WireError(f"the header's {name} is {value!r}; must be a text")
    return value


def number(header: Mapping[str, object], name: str) -> float:
    """A number of a header.

    Args:
        header: as it was read.
        name: its key.

    Raises:
        WireError: it is missing or no number.
    """
    value = header.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WireError(f"the header's {name} is {value!r}; must be a number")
    try:
        return float(value)
    except OverflowError as error:
        raise WireError(
            f"the header's {name} is a whole number beyond the largest float"
        ) from error


def whole_number(header: Mapping[str, object], name: str) -> int:
    """A whole number, 0 or more, of a header.

    Args:
        header: as it was read.
        name: its key.

    Raises:
        WireError: it is missing or something else.
    """
    value = header.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise WireError(f"the header's {name} is {value!r}; must be a whole number, 0 or more")
    return value
