"""A node's resident process, which keeps the base in memory.

Flower starts a process for each message, and that one hands it over here.

The two talk over a Unix socket in a folder that only this user can enter. What travels between them
are bytes; nothing is unpickled. The resident process ends when the process that started the
messages does (Flower's SuperNode), after an hour without a message, or when it works longer than
the server waits for the answer. This module is imported for each message, so it imports nothing
that takes long.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from fedmira.federation.codes import NodeError, code_text
from fedmira.federation.sockets import check_peer, own_folder

if TYPE_CHECKING:
    from fedmira.federation.guard import GuardedNode

__all__ = ["NodeError", "answer_here", "ask_resident"]

_IDLE_SECONDS = 3600.0
_START_SECONDS = 600.0
_DONE, _REFUSED = b"done", b"refused"


def answer_here(
    node: Mapping[str, object], settings: Mapping[str, object], kind: str, content: bytes
) -> bytes:
    """Answer a message in this process, which loads the base for it.

    Args:
        node: the node's config.
        settings: the run's settings by dotted key.
        kind: of the message.
        content: the message.

    Raises:
        NodeError: it cannot be done.
    """
    from fedmira.federation.guard import GuardedNode

    return GuardedNode().answer(node, settings, kind, content)


def ask_resident(
    node: Mapping[str, object], settings: Mapping[str, object], kind: str, content: bytes
) -> bytes:
    """Have the resident process of this node answer, and start it where there is none.

    Args:
        node: the settings that the node was started with.
        settings: those of the run.
        kind: the message's type.
        content: the message, as one run of bytes.

    Raises:
        NodeError: it cannot be done; the message is the resident process's own.
    """
    order = json.dumps({"node": dict(node), "settings": dict(settings), "kind": kind}).encode()
    place = _place(os.getppid(), str(node.get("name", "")))
    try:
        with _connected(place) as line:
            check_peer(line)
            line.send_bytes(order)
            line.send_bytes(content)
            ending, answer = line.recv_bytes(), line.recv_bytes()
    except (EOFError, ConnectionError) as error:
        raise _failed(
            f"the node's resident process ended while it worked: {_last_words(place)}"
        ) from error
    except OSError as error:
        raise _failed(
            f"{place}: the node's resident process cannot be reached ({error}); set "
            "XDG_RUNTIME_DIR or TMPDIR to a short path of a local disk"
        ) from error
    if ending == _REFUSED:
        raise NodeError(*json.loads(answer))
    return answer


def _place(guardian: int, name: str) -> Path:
    """The socket of a SuperNode's resident process, in a folder of this user's alone."""
    return own_folder() / f"{guardian}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.socket"


def _connected(place: Path) -> Connection:
    """A line to the resident process, which is started where nobody listens.

    Of several at once, one starts it.
    """
    with FileLock(place.with_suffix(".lock")):
        try:
            return Client(str(place), "AF_UNIX")
        except (FileNotFoundError, ConnectionRefusedError):
            place.unlink(missing_ok=True)
        with place.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "fedmira.federation.resident",
                    str(place),
                    str(os.getppid()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and process.poll() is None:
            try:
                return Client(str(place), "AF_UNIX")
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.05)
        raise _failed(f"the node's resident process did not start: {_last_words(place)}")


def _failed(text: str) -> NodeError:
    """The process itself failed; its words are for this node's log alone."""
    return NodeError(text, code_text("node"))


def _last_words(place: Path) -> str:
    """The last line that the resident process wrote, and where the rest stands."""
    log = place.with_suffix(".log")
    lines = (
        log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if log.exists()
        else []
    )
    return f"{lines[-1] if lines else 'it wrote nothing'} ({log})"


class _Host:
    """The resident process: one node at a time, built anew when other settings come."""

    def __init__(self, place: Path, guardian: int) -> None:
        self._place = place
        self._guardian = guardian
        self._idle_since = time.monotonic()
        self._deadline = math.inf
        self._node: GuardedNode | None = None

    def run(self) -> None:
        """Answer one message after another."""
        listener = Listener(str(self._place), "AF_UNIX")
        threading.Thread(target=self._watch, daemon=True).start()
        while True:
            with listener.accept() as line:
                try:
                    check_peer(line)
                except NodeError as error:
                    sys.stderr.write(f"{error}\n")
                    continue
                order, content = json.loads(line.recv_bytes()), line.recv_bytes()
                self._idle_since = math.inf
                self._deadline = time.monotonic() + _patience(order)
                try:
                    ending, answer = _DONE, self._answer(order, content)
                except NodeError as error:
                    ending, answer = _REFUSED, json.dumps([str(error), error.told]).encode()
                line.send_bytes(ending)
                line.send_bytes(answer)
                self._deadline, self._idle_since = math.inf, time.monotonic()

    def _answer(self, order: Mapping[str, Any], content: bytes) -> bytes:
        from fedmira.federation.guard import GuardedNode

        self._node = self._node or GuardedNode()
        return self._node.answer(order["node"], order["settings"], order["kind"], content)

    def _watch(self) -> None:
        """End the process when nothing needs it any more.

        Its SuperNode is gone, nobody has asked for long, or nobody waits for its answer.
        """
        while _is_alive(self._guardian) and time.monotonic() - self._idle_since < _IDLE_SECONDS:
            if time.monotonic() > self._deadline:
                sys.stderr.write(
                    "no answer within federation.reply_s; the work hangs, or the machine "
                    "is too slow for it\n"
                )
                break
            time.sleep(0.5)
        self._place.unlink(missing_ok=True)
        os._exit(0)


def _patience(order: Mapping[str, Any]) -> float:
    """How long the server waits for an answer, in seconds; it may have sent anything."""
    said = order["settings"].get("federation.reply_s")
    return float(said) if isinstance(said, int | float) and said > 0 else math.inf


def _is_alive(process: int) -> bool:
    """Whether this user has such a process; one of somebody else has only taken over the number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    _Host(Path(sys.argv[1]), int(sys.argv[2])).run()
