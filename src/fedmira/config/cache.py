"""Where fedmira keeps what it can find out again.

Tokenised rows, and what this machine is fastest with.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path | None:
    """$FEDMIRA_CACHE, or the folder fedmira in the user's cache folder.

    None where $FEDMIRA_CACHE is "off" or nothing can be written.

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
    return folder if os.access(folder, os.W_OK) else None
