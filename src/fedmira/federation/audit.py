"""The record of what travelled: a line for each message, each sealed and chained to the one before.

A line says which way a message went, its kind and round, its bytes and their SHA-256, and what it
contained by name and shape, and no content. Both ends keep one: a node beside its private memory,
the server beside its run folder. What the chain shows is that no line was changed, taken out or put
in between; whoever can write the file can write the whole chain anew, and can cut off its end, so
the last seal is to be noted elsewhere (`fedmira audit` prints it).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedmira.errors import RunFolderError, WireError
from fedmira.wire import Encoded, unpack

__all__ = ["AuditLog", "AuditSummary", "audit_beside", "verify_audit"]

_FORM_LENGTH = 16
_START = ""


def audit_beside(output: Path) -> Path:
    """The server's record of a run, beside the run folder: messages travel before there is one.

    Args:
        output: the run folder.
    """
    return output.with_name(f"{output.name}-audit.jsonl")


class AuditLog:
    """Adds lines to a record; several processes may add to one file.

    Args:
        path: of the file, whose folder is made where it is missing, closed to other users.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = -1
        self._last = _START
        self._number = 0
        self._forms: set[str] = set()

    def add(self, way: str, kind: str, peer: str, content: bytes) -> None:
        """A line for a message, on the disk when this returns.

        Args:
            way: "in" or "out".
            kind: of the message.
            peer: the client, or "server".
            content: the message as it travelled.

        Raises:
            RunFolderError: the file cannot be written.
        """
        try:
            message = unpack(content)
        except WireError:
            message = None
        holds, forms = _contents(message)
        self._write({**_about(way, kind, peer, message), **_weight(content), **holds}, forms)

    def add_error(self, way: str, kind: str, peer: str, text: str) -> None:
        """A line for an error that travelled in place of an answer.

        Args:
            way: "in" or "out".
            kind: of the message that it answers.
            peer: the client, or "server".
            text: of the error, as it travelled.

        Raises:
            RunFolderError: the file cannot be written.
        """
        about = {"way": way, "kind": kind, "peer": peer, "error": text[:500]}
        self._write({**about, **_weight(text.encode())}, {})

    def _write(self, line: dict[str, Any], forms: Mapping[str, Any]) -> None:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(self.path.with_name(self.path.name + ".lock")):
                self._catch_up()
                new = {form: of for form, of in forms.items() if form not in self._forms}
                if new:
                    line = {**line, "forms": new}
                at = datetime.now(UTC).isoformat(timespec="seconds")
                line = {"line": self._number + 1, "at": at, **line, "before": self._last}
                text = json.dumps({**line, "seal": _seal(line)}).encode() + b"\n"
                _append(self.path, text)
                self._number, self._last = self._number + 1, hashlib.sha256(text[:-1]).hexdigest()
                self._size += len(text)
                self._forms |= set(new)
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: the record of messages cannot be written ({error}); make room, or "
                "choose another folder"
            ) from error

    def _catch_up(self) -> None:
        """Learn the last line where another process has added some, or this one begins."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size == self._size:
            return
        self._number, self._last, self._forms = 0, _START, set()
        if size:
            raw = self.path.read_bytes()
            if not raw.endswith(b"\n"):  # a power cut; the line stands, and is told as broken
                _append(self.path, b"\n")
                size += 1
            for text in raw.removesuffix(b"\n").split(b"\n"):
                self._number, self._last = self._number + 1, hashlib.sha256(text).hexdigest()
                if b'"forms"' in text:
                    self._forms |= set(_parsed(text).get("forms", {}))
        self._size = size


@dataclass
class AuditSummary:
    """What a record says in the whole.

    Attributes:
        lines: messages and errors.
        messages: (way, kind) -> how many.
        size: (way, kind) -> their bytes.
        left: names of fields and parts that went out -> in how many messages.
        errors: errors that went out or came in.
        peers: the other ends.
        last: SHA-256 of the last line.
    """

    lines: int = 0
    messages: dict[tuple[str, str], int] = field(default_factory=dict)
    size: dict[tuple[str, str], int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    errors: int = 0
    peers: set[str] = field(default_factory=set)
    last: str = _START

    def count(self, line: Mapping[str, Any]) -> None:
        """Take in a line.

        Args:
            line: a whole one.
        """
        key = (str(line["way"]), str(line["kind"]))
        self.lines += 1
        self.messages[key] = self.messages.get(key, 0) + 1
        self.size[key] = self.size.get(key, 0) + int(line["bytes"])
        self.peers.add(str(line["peer"]))
        self.errors += "error" in line
        if line["way"] == "out":
            for name in ("error",) if "error" in line else (*line["fields"], *line["parts"]):
                self.left[name] = self.left.get(name, 0) + 1


def verify_audit(path: Path) -> AuditSummary:
    """Check the chain of a record.

    Args:
        path: of the file.

    Raises:
        RunFolderError: it cannot be read, or a line is broken; the message names the first one.
    """
    summary = AuditSummary()
    for number, text in _lines(path):
        line = _parsed(text)
        seal = line.pop("seal", None)
        if not line or seal != _seal(line):
            raise _broken(path, number, "it is not as it was written")
        if line.get("line") != number or line.get("before") != summary.last:
            raise _broken(path, number, "it does not follow the line before it")
        try:
            summary.count(line)
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(path, number, f"it lacks {error}") from error
        summary.last = hashlib.sha256(text).hexdigest()
    return summary


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line with its number, from 1.

    Raises:
        RunFolderError: the file cannot be read, or its last line does not end.
    """
    number = 0
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith(b"\n"):
                    raise _broken(path, number, "it is cut off")
                yield number, text[:-1]
    except OSError as error:
        raise RunFolderError(f"{path}: the record cannot be read ({error})") from error
    if not number:
        raise RunFolderError(f"{path}: the record is empty; nothing has travelled, or it is lost")


def _broken(path: Path, number: int, reason: str) -> RunFolderError:
    return RunFolderError(
        f"{path}: line {number}: {reason}; what stands from this line on cannot be relied on"
    )


def _append(path: Path, text: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, text)
        os.fsync(handle)
    finally:
        os.close(handle)


def _parsed(text: bytes) -> dict[str, Any]:
    """A line as JSON; empty where it is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) else {}


def _seal(line: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(line).encode()).hexdigest()


def _about(way: str, kind: str, peer: str, message: Encoded | None) -> dict[str, Any]:
    number = message.header.get("round") if message else None
    told = {"round": number} if type(number) is int and abs(number) < 2**63 else {}
    return {"way": way, "kind": kind, "peer": peer, **told}


def _weight(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _contents(message: Encoded | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a message holds, and the names and shapes of its arrays under the hash of them.

    Names and shapes of an adapter are the same in every round; they stand in the record once.
    """
    if message is None:
        return {"fields": {}, "parts": {"unreadable": {}}}, {}
    shown = {
        name[:200]: f"text of {len(value)}" if isinstance(value, str) else "number"
        for name, value in message.header.items()
    }
    shapes: dict[str, dict[str, str]] = {}
    for name, array in sorted(message.arrays.items()):
        part, _, rest = name.partition("|")
        shapes.setdefault(part, {})[rest] = f"{array.dtype.name} {list(array.shape)}"
    parts, forms = {}, {}
    for part, of in shapes.items():
        form = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:_FORM_LENGTH]
        forms[form] = of
        size = sum(
            array.size for name, array in message.arrays.items() if name.startswith(f"{part}|")
        )
        parts[part] = {"arrays": len(of), "numbers": int(size), "form": form}
    return {"fields": shown, "parts": parts}, forms
