"""Reads UTF-8 JSON and JSON Lines files, noting every broken place with its file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedmira.data.problems import Problems

__all__ = ["read_json", "read_json_lines", "read_text"]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_text(path: Path, problems: Problems) -> str | None:
    """The text of a UTF-8 file (a byte order mark is dropped), or None with a problem noted.

    Args:
        path: a file.
        problems: collects what is wrong, with its place.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        problems.add(f"{path}: cannot be read ({error.strerror})")
        return None
    return _decode(
        data.removeprefix(_BYTE_ORDER_MARK),
        path,
        len(data) - len(data.removeprefix(_BYTE_ORDER_MARK)),
        problems,
    )


def read_json(path: Path, problems: Problems) -> Mapping[str, Any] | None:
    """The JSON object in a file, or None with a problem noted.

    Args:
        path: a file.
        problems: collects what is wrong, with its place.
    """
    text = read_text(path, problems)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        problems.add(f"{path}:{error.lineno}: broken JSON: {error.msg} (column {error.colno})")
        return None
    except (ValueError, RecursionError) as error:
        problems.add(f"{path}:1: broken JSON: {error}")
        return None
    if not isinstance(value, dict):
        problems.add(f"{path}:1: holds a {type(value).__name__}; one JSON object is expected")
        return None
    return value


def read_json_lines(path: Path, problems: Problems) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects of a JSON Lines file with their line numbers, from 1.

    Blank lines are passed over.

    A broken line is noted and the next one is read; at a byte that is not UTF-8 the file is given
    up.

    Args:
        path: a file.
        problems: collects what is wrong, with its place.
    """
    try:
        handle = path.open("rb")
    except OSError as error:
        problems.add(f"{path}: cannot be read ({error.strerror})")
        return
    offset = 0
    with handle:
        # Only the newline byte ends a line: other line separators may stand inside a JSON string.
        for number, raw in enumerate(handle, start=1):
            mark = len(_BYTE_ORDER_MARK) if number == 1 and raw.startswith(_BYTE_ORDER_MARK) else 0
            text = _decode(raw[mark:], path, offset + mark, problems)
            if text is None:
                return
            offset += len(raw)
            row = (
                _parse_line(text.rstrip("\r\n"), f"{path}:{number}", problems)
                if text.strip()
                else None
            )
            if row is not None:
                yield number, row


def _parse_line(text: str, where: str, problems: Problems) -> Mapping[str, Any] | None:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = (
            "; JSON Lines holds one object a line, not one list"
            if text.lstrip().startswith("[")
            else ""
        )
        problems.add(f"{where}: broken JSON: {error.msg} (column {error.colno}){hint}")
        return None
    except (ValueError, RecursionError) as error:
        problems.add(f"{where}: broken JSON: {error}")
        return None
    if not isinstance(value, dict):
        problems.add(f"{where}: holds a {type(value).__name__}; JSON Lines holds one object a line")
        return None
    return value


def _decode(data: bytes, path: Path, offset: int, problems: Problems) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        problems.add(f"{path}: not UTF-8 at byte {offset + error.start}; save the file as UTF-8")
        return None
