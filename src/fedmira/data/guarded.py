"""Files whose reader may end its process, or never come back, are read in another process first.

A damaged parquet or arrow file makes its library run into a segmentation fault, which nobody can
catch. What another process has read whole, this one can read, too.
"""

from __future__ import annotations

import atexit
import json
import select
import subprocess
import sys
from pathlib import Path
from typing import Literal

__all__ = ["lethal"]

_SCRIPT = Path(__file__).with_name("look.py")
_SECONDS, _BYTES_A_SECOND = 120.0, 2**20
"""How long a file may take: this, and a second for so many bytes of it."""


class _Reader:
    """The other process; started when it is needed, and anew after a file that ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def end(self) -> str:
        """End the process; how it ended, in words."""
        if self._process is None:
            return ""
        self._process.kill()
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process = None
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def look(self, kind: str, place: str, data: bytes, seconds: float | None) -> str:
        """Why what is asked for must not be read here; "" where it may."""
        process = self._process = self._process or _started()
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        order = json.dumps({"kind": kind, "place": place, "bytes": len(data)}).encode()
        try:
            process.stdin.write(order + b"\n" + data)
            process.stdin.flush()
            if seconds is not None and not _ready(process, seconds):
                self.end()
                return f"it was not read within {seconds:.0f} s"
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if answer:
            return ""
        try:
            code = process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = 0
        self.end()
        return f"its reader ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"


_READER = _Reader()
atexit.register(_READER.end)


def lethal(kind: Literal["parquet", "saved", "hub"], place: str, data: bytes = b"") -> str:
    """Why a file would end the process that reads it; "" where it would not.

    Errors that can be caught are no matter here: whoever reads it next meets them.

    Args:
        kind: a parquet file, a data set that `save_to_disk` wrote, or one of the hub.
        place: the path or id of a data set; of a parquet file nothing but a name.
        data: the content of a parquet file.
    """
    seconds = None if kind == "hub" else _SECONDS + len(data) / _BYTES_A_SECOND
    return _READER.look(kind, place, data, seconds)


def _started() -> subprocess.Popen[bytes]:
    # -P: the folder of the script is not searched for modules, whose names are those of libraries.
    return subprocess.Popen(
        [sys.executable, "-P", str(_SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _ready(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether an answer, or the end of the process, came in time."""
    if sys.platform == "win32":
        return True  # pipes cannot be waited for there
    assert process.stdout is not None, "it is a pipe"
    ready, _, _ = select.select([process.stdout.fileno()], [], [], seconds)
    return bool(ready)
