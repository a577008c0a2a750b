"""What tests have worker processes do: they import it, as they cannot import a test."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from pathlib import Path

from fedmira.config import setting
from fedmira.errors import RunError
from fedmira.messages import Payload
from fedmira.methods import Start
from fedmira.methods.local import Local

__all__ = ["Dying", "Fails", "Told"]


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


class Told:
    """Work that writes a line into the log."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, kind: object) -> int:
        """The square of its number."""
        logging.getLogger("fedmira").warning("share %d", self.number)
        return self.number**2


class Fails(Told):
    """Work that cannot be done, from the third on."""

    def __call__(self, kind: object) -> int:
        """Raises with its number and the worker's own kind."""
        if self.number == 3:
            raise RunError(f"share {self.number} of {type(kind).__name__}")
        return self.number
