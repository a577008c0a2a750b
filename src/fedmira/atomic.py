"""The one way in which files and folders are replaced: whole, or not at all.

Whatever ends the process, the old content or the new one is there. Imports nothing of the package
and no heavy library, so every room may use it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

__all__ = ["PARTIAL", "replace_file", "replace_folder", "sync", "sync_below"]

PARTIAL = ".partial"
"""The end of a name under which something is written before it takes its place."""


def replace_file(
    path: Path,
    content: str | bytes,
    *,
    lasting: bool = True,
    shared: bool = False,
    mode: int = 0o666,
) -> None:
    """Put a file with this content in the place of `path`, in a folder that exists.

    Args:
        path: the file that is replaced or made.
        content: text is written as UTF-8, its line ends as they are.
        lasting: the disk holds the file when this returns, so that it survives a power cut.
        shared: several processes may write this path at once; each then writes aside under a name
            of its own.
        mode: the permissions of a new file, before the user's mask.

    Raises:
        OSError: it cannot be written. `path` is as it was, and nothing is left beside it.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    aside = f"{path.name}.{os.getpid()}" if shared else path.name
    partial = path.with_name(aside + PARTIAL)
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    if lasting:
        sync(path.parent)


def replace_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Put a folder with these files, all held by the disk, in the place of `path`.

    A crash between the removal of the old folder and the renaming of the new one leaves neither
    under this name, so a caller that needs one of them gives each version a name of its own.

    Args:
        path: the folder that is replaced or made.
        files: file name -> content.
    """
    partial = path.with_name(path.name + PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    for name, content in files.items():
        with (partial / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    sync(partial)
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or to a folder's list of files."""
    if os.name == "nt":
        return  # folders cannot be opened there, nor files that were opened for reading be flushed
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_below(folder: Path) -> None:
    """Have the disk hold all files and folders in a folder, written one after another before.

    Much sooner done than each file on its own, as the disk writes what is there in one go.

    Args:
        folder: which is there.
    """
    for place, _, names in os.walk(folder):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))
