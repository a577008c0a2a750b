"""Where a node's socket lies, and who is at its other end.

Other users of the machine must neither see what travels nor answer in the node's place. Imports
nothing that takes long.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from fedmira.federation.codes import NodeError, code_text

__all__ = ["check_peer", "own_folder", "peer_of"]

_LOCAL_PEERCRED = 1
"""macOS's option of the level 0 that tells the other end's user; Python has no name for it."""


def own_folder() -> Path:
    """This user's folder for sockets: in $XDG_RUNTIME_DIR, else in the folder for what passes.

    It is made where it is missing. No link is followed to it.

    Raises:
        NodeError: the folder is a link, another user's, or open to others; or others may put
            something else in its place.
    """
    above = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    folder = above / f"fedmira-{os.getuid()}"
    try:
        _check_above(above)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            pass
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            about = os.fstat(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise _unfit(folder, f"it cannot be used ({error})") from error
    if about.st_uid != os.getuid():
        raise _unfit(folder, f"it belongs to user {about.st_uid}, and this is {os.getuid()}")
    if about.st_mode & 0o077:
        raise _unfit(folder, f"others may enter it (mode {stat.S_IMODE(about.st_mode):o})")
    return folder


def check_peer(line: Connection) -> None:
    """Hold the other end of a line against this user.

    Args:
        line: over a Unix socket.

    Raises:
        NodeError: the other end is another user's.
    """
    user = peer_of(line)
    if user is not None and user != os.getuid():
        text = f"the other end of the node's socket belongs to user {user}, not {os.getuid()}"
        raise NodeError(text, code_text("node"))


def peer_of(line: Connection) -> int | None:
    """The user at the other end of a line; None where the system does not tell.

    Args:
        line: over a Unix socket.
    """
    end = socket.socket(fileno=os.dup(line.fileno()))
    try:
        if hasattr(socket, "SO_PEERCRED"):
            credentials = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return int(struct.unpack("3i", credentials)[1])
        if sys.platform == "darwin":
            credentials = end.getsockopt(0, _LOCAL_PEERCRED, 8)
            return int(struct.unpack("2I", credentials)[1])
        return None
    finally:
        end.close()


def _check_above(above: Path) -> None:
    """Refuse a folder in which others could rename ours.

    Raises:
        NodeError: they could.
    """
    about = above.stat()
    open_to_all = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if about.st_uid not in (0, os.getuid()) or (open_to_all and not about.st_mode & stat.S_ISVTX):
        raise _unfit(
            above, f"it belongs to user {about.st_uid}, or others may rename what it holds"
        )


def _unfit(folder: Path, reason: str) -> NodeError:
    return NodeError(
        f"{folder}: {reason}; the node's socket needs a folder of this user's alone: set "
        "XDG_RUNTIME_DIR or TMPDIR to one, with a short path and mode 700",
        code_text("node"),
    )
