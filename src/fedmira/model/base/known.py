"""What was found out once, by key, in a sealed JSON file of the cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fedmira.atomic import replace_file

__all__ = ["keep_known", "read_known"]

_Value = TypeVar("_Value")
_log = logging.getLogger("fedmira")


def read_known(path: Path, parse: Callable[[Any], _Value], again: str) -> dict[str, _Value]:
    """What is known; what cannot be read is found out again, and that is said.

    Args:
        path: of the file; nothing is known where it is not there.
        parse: makes a value of what JSON has for it.
        again: what happens where the file is damaged, for the warning.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = {key: parse(value) for key, value in found["known"].items()}
        sound = found["sha256"] == _seal(known)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        sound = False
    if not sound:
        _log.warning("%s is damaged, or an older version wrote it; %s", path, again)
    return known if sound else {}


def keep_known(path: Path, known: Mapping[str, Any], again: str) -> None:
    """Write what is known; where that cannot be, it is said.

    Args:
        path: of the file.
        known: by key, as JSON can hold it.
        again: what happens next time where it cannot be written, for the warning.
    """
    try:
        document = {"known": known, "sha256": _seal(known)}
        replace_file(path, json.dumps(document, indent=1), lasting=False, shared=True)
    except OSError as error:
        _log.warning("%s cannot be written (%s); %s", path, error, again)


def _seal(known: Mapping[str, Any]) -> str:
    """SHA-256 over what is known."""
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
