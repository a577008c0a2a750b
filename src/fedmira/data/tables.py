"""Rows of one file: JSON Lines, a JSON list, CSV, TSV or parquet, each perhaps packed by gzip."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from fedmira.data.delimited import rows_of_text
from fedmira.data.files import read_json_lines
from fedmira.data.guarded import lethal
from fedmira.data.problems import Problems
from fedmira.data.texts import Row

__all__ = ["ENDINGS", "ending_of", "read_table", "stem_of"]

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".tab", ".parquet")
"""Endings of files with rows, in any case; each may be followed by .gz."""

_PACKED = ".gz"
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def ending_of(path: Path) -> str:
    """The ending of a file with rows, in small letters and without .gz; "" of any other file."""
    name = path.name.lower().removesuffix(_PACKED)
    return next((ending for ending in ENDINGS if name.endswith(ending)), "")


def stem_of(path: Path) -> str:
    """A file's name without the ending of its rows."""
    name = path.name[: -len(_PACKED)] if path.name.lower().endswith(_PACKED) else path.name
    return name[: len(name) - len(ending_of(path))]


def read_table(path: Path, problems: Problems, notes: list[str]) -> Iterator[tuple[str, Row]]:
    """The rows of a file with their places.

    Args:
        path: a file with one of `ENDINGS`, or with JSON Lines under any other.
        problems: receives what cannot be read.
        notes: receives which encoding and delimiter were found, where they are not the usual ones.
    """
    ending = ending_of(path)
    packed = path.name.lower().endswith(_PACKED)
    if ending in ("", ".jsonl", ".ndjson") and not packed and not _is_utf16(path):
        for number, row in read_json_lines(path, problems):
            yield f"{path}:{number}", row
        return
    data = _bytes(path, packed, problems)
    if data is None:
        return
    if ending == ".parquet":
        yield from _parquet(data, path, problems)
    elif ending in (".csv", ".tsv", ".tab"):
        text, encoding = _decoded(data)
        if encoding not in ("utf-8", "utf-8-sig"):
            notes.append(f"{path}: read as {encoding}; it is not UTF-8")
        yield from rows_of_text(text, ending != ".csv", path, problems, notes)
    else:
        yield from _json(data, path, problems, notes)


def _is_utf16(path: Path) -> bool:
    try:
        with path.open("rb") as handle:
            return handle.read(2) in (b"\xff\xfe", b"\xfe\xff")
    except OSError:
        return False  # the reader of the lines says why


def _bytes(path: Path, packed: bool, problems: Problems) -> bytes | None:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if packed else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problems.add(f"{path}: cannot be unpacked by gzip ({error}); pack it anew")
    except OSError as error:
        problems.add(f"{path}: cannot be read ({error.strerror or error})")
    return None


def _decoded(data: bytes) -> tuple[str, str]:
    """A text and its encoding: by its mark, else UTF-8 where it is, else that of Windows."""
    encodings = [name for mark, name in _MARKS if data.startswith(mark)]
    for encoding in (*encodings, "utf-8", "cp1252"):
        try:
            return data.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1"), "latin-1"


def _parquet(data: bytes, path: Path, problems: Problems) -> Iterator[tuple[str, Row]]:
    # Other bytes are not shown to the reader at all: it may end the process.
    if len(data) < 12 or data[:4] != b"PAR1" or data[-4:] != b"PAR1":
        problems.add(f"{path}: is no parquet file; it must begin and end with PAR1")
        return
    if reason := lethal("parquet", path.name, data):
        problems.add(f"{path}: cannot be read as parquet ({reason}); the file is damaged")
        return
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
        number = 0
        for batch in table.to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        problems.add(f"{path}: cannot be read as parquet ({reason[:200]})")


def _json(
    data: bytes, path: Path, problems: Problems, notes: list[str]
) -> Iterator[tuple[str, Row]]:
    """A JSON list of objects, or JSON Lines."""
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        problems.add(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8")
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if _first_is_whole(text):
            yield from _lines(text, path, problems)
        else:
            problems.add(f"{path}:{error.lineno}: broken JSON: {error.msg} (column {error.colno})")
        return
    except (ValueError, RecursionError) as error:
        problems.add(f"{path}: broken JSON: {error}")
        return
    lists = {key: held for key, held in value.items() if _is_rows(held)} if _is_map(value) else {}
    if len(lists) == 1:
        (key,) = lists
        notes.append(f"{path}: read the list under {key!r}")
        value = lists[key]
    elif _is_map(value):
        value = [value]
    if not isinstance(value, list):
        kind = "null" if value is None else type(value).__name__
        problems.add(f"{path}: holds {kind}; must be a list of rows, or one object a line")
        return
    for number, row in enumerate(value, start=1):
        if _is_map(row):
            yield f"{path} row {number}", row
        else:
            problems.add(f"{path} row {number}: is of type {type(row).__name__}; must be an object")


def _is_map(value: object) -> bool:
    return isinstance(value, dict)


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_map, value))


def _first_is_whole(text: str) -> bool:
    """Whether the first line that is not blank is a JSON value by itself."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(text: str, path: Path, problems: Problems) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.add(f"{path}:{number}: broken JSON: {error}")
            continue
        if _is_map(row):
            yield f"{path}:{number}", row
        else:
            problems.add(f"{path}:{number}: holds a {type(row).__name__}; must be an object")
