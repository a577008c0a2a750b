"""Errors of the machine, such as a full disk, as errors of ours in one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from fedmira.errors import MachineError

__all__ = ["machine_errors", "told"]

_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room in this user's quota",
    errno.EFBIG: "allow larger files there, or choose another place",
    errno.EACCES: "allow this user to read and write there",
    errno.EPERM: "allow this user to read and write there",
    errno.EROFS: "that place can only be read; choose another one",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "put it back",
    errno.ENOTDIR: "put back the folder",
    errno.ESTALE: "the place is gone; connect it again",
    errno.EIO: "the disk gives errors; save what is on it",
    errno.EMFILE: "allow more open files",
    errno.ENFILE: "allow more open files",
}


@contextmanager
def machine_errors() -> Iterator[None]:
    """Within the block, what the system refuses is a `MachineError`.

    Raises:
        MachineError: the system refused an operation on a file.
    """
    try:
        yield
    except OSError as error:
        raise MachineError(told(error)) from error


def told(error: OSError, place: object = "") -> str:
    """What the system refused, on which file, and what to do, in one line.

    Args:
        error: of the system.
        place: named where the error names no file.
    """
    file = error.filename if error.filename is not None else place
    what = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0, "mend that")
    return " ".join(f"{f'{file}: ' if file else ''}{what}; {remedy}".split())
