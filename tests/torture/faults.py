"""Faults at the k-th operation on files below a folder, in a process of its own.

Python tells its audit hooks of each operation before it is done, so a hook can count them, end the
process as SIGKILL does, or raise what the system raises on a full or read-only disk. `os.fsync` has
no such event and is wrapped.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["ERRORS", "Ended", "apart", "call", "counting", "failing_at", "killing_at"]

ERRORS = ("ENOSPC", "EACCES", "EROFS", "EIO", "ENAMETOOLONG", "ENOENT", "EDQUOT")
_WRITES = ("w", "a", "x", "+")
_OTHERS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


@dataclass(frozen=True)
class Ended:
    """How a process ended: a signal, or the code and output of the command that ran in it."""

    signal: int
    code: int
    err: str
    operations: int


def counting(folder: Path) -> Callable[[], int]:
    """Count the operations that change files below a folder, from now on in this process."""
    return _watch(folder, lambda number, path: None)


def killing_at(folder: Path, number: int) -> None:
    """End this process before its operation of this number, as SIGKILL does."""

    def act(at: int, path: str) -> None:
        if at == number:
            os.kill(os.getpid(), signal.SIGKILL)

    _watch(folder, act)


def failing_at(folder: Path, number: int, error: str, lasting: bool) -> None:
    """Let the system refuse an operation of this process, or all from there on.

    Args:
        number: of the operation, from 1.
        error: the name of an errno.
        lasting: whether all that follow are refused, too.
    """
    code = getattr(errno, error)

    def act(at: int, path: str) -> None:
        if at == number or (lasting and at > number):
            raise OSError(code, os.strerror(code), path)

    _watch(folder, act)


def _watch(folder: Path, act: Callable[[int, str], None]) -> Callable[[], int]:
    count, below, sync = 0, str(folder), os.fsync
    within = False

    def note(path: object) -> None:
        nonlocal count, within
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if text.startswith(below) and not within:
            count, within = count + 1, True
            try:
                act(count, text)
            finally:
                within = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = any(each in mode for each in _WRITES) if mode else flags & 3
            if writes:
                note(path)
        elif event in _OTHERS:
            note(arguments[0])

    def synced(handle: int) -> None:
        place = Path(f"/proc/self/fd/{handle}")
        note(str(place.readlink()) if place.exists() else "")
        sync(handle)

    sys.addaudithook(hook)
    os.fsync = synced  # type: ignore[assignment]
    return lambda: count


def call(*arguments: str | Path) -> tuple[int, str]:
    """The command line in this process: its code and what it said on stderr."""
    from fedmira.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["fedmira", *map(str, arguments)]
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as ending:
            code = int(ending.code or 0)
        except BaseException:  # noqa: BLE001 - a traceback is what is looked for
            traceback.print_exc(file=err)
            code = 1
    return code, err.getvalue()


def apart(work: Callable[[], tuple[int, str, int]], seconds: int = 300) -> Ended:
    """Do work in a copy of this process.

    Args:
        work: gives a code, a text, and a number of operations.
        seconds: after which it counts as hanging and is ended by SIGALRM.
    """
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        process = os.fork()
    if process == 0:
        os.close(read)
        torch.set_num_threads(1)  # threads do not come along
        signal.alarm(seconds)
        try:
            answer = json.dumps(work()).encode()
        except BaseException:  # noqa: BLE001 - whatever it is, the parent must hear of it
            answer = json.dumps((1, traceback.format_exc(), 0)).encode()
        with os.fdopen(write, "wb") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(process, 0)
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    code, err, operations = json.loads(answer) if answer else (-1, "", 0)
    return Ended(ended_by, code, err, operations)
