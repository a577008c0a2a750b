"""A method whose clients end their process, for tests of worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

from fedmira.config import setting
from fedmira.messages import Payload
from fedmira.methods import Start
from fedmira.methods.local import Local

__all__ = ["Dying"]


class Dying(Local):
    """Local training that kills the worker process it is in where a file says so."""

    flag: str = setting("", help="While this file has a line, the process that reads it ends.")

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Takes one line from the file, and the process with it."""
        if multiprocessing.parent_process() is None:  # not in the run's own process
            return super().begin(payload, memory)
        lines = Path(self.flag).read_text(encoding="ascii").splitlines()
        if lines:
            Path(self.flag).write_text("\n".join(lines[1:]), encoding="ascii")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().begin(payload, memory)
