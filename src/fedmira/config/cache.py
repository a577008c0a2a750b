"""Where fedmira keeps what it can find out again.

Tokenised rows, and what this machine is fastest with.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

__all__ = ["cache_folder", "distrusted"]

_log = logging.getLogger("fedmira")
_told: set[str] = set()


def cache_folder() -> Path | None:
    """$FEDMIRA_CACHE, or the folder fedmira in the user's cache folder.

    None where $FEDMIRA_CACHE is "off", nothing can be written, or others could write there, which a
    warning says: what is read back becomes tokens of rows.

    The folder is made where it is missing, readable for its owner alone: it holds tokens of the
    user's rows.
    """
    named = os.environ.get("FEDMIRA_CACHE")
    if named == "off":
        return None
    try:
        folder = (
            Path(named)
            if named
            else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedmira"
        )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return None
    if (reason := distrusted(folder)) and str(folder) not in _told:
        _told.add(str(folder))
        _log.warning(
            "%s: the cache is not used: %s; make it yours alone (chmod 700), or name another "
            "folder in FEDMIRA_CACHE",
            folder,
            reason,
        )
    return folder if not reason and os.access(folder, os.W_OK) else None


def distrusted(folder: Path) -> str:
    """Why what lies in a folder may be of somebody else's making; "" where it is this user's alone.

    Args:
        folder: which is there.
    """
    if os.name == "nt":  # permissions there are other ones
        return ""
    try:
        about = folder.stat()
    except OSError as error:
        return error.strerror or str(error)
    if about.st_uid != os.geteuid():
        return f"it belongs to another user (uid {about.st_uid})"
    if about.st_mode & stat.S_IWOTH:
        return "everybody can write there"
    if about.st_mode & stat.S_IWGRP and about.st_gid != os.getegid():
        return f"the group {about.st_gid} can write there"
    return ""
