"""Folders that are there with all their files or not at all, and the hashes of these."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedmira.atomic import PARTIAL, sync
from fedmira.errors import RunFolderError
from fedmira.records.folder import RecordedFolder
from fedmira.records.hashes import RECORD

__all__ = ["check_files", "check_new", "new_folder"]

_FOR_PEOPLE = (".md", ".html")
_ABOVE = 2
"""An adapter lies in a folder of adapters, and that one in a run."""


def check_new(path: Path) -> None:
    """Nothing may be where something is to be written.

    Args:
        path: of a folder.

    Raises:
        RunFolderError: something is.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunFolderError(
            f"{path}: it is there already and is never overwritten; choose another --output"
        )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which has its name once everything is in it.

    All files are then recorded in its hashes.sha256, as `fedmira verify` reads it. Where the block
    fails nothing is left.

    Args:
        path: new or empty.

    Raises:
        RunFolderError: the path is taken.
    """
    check_new(path)
    aside = path.with_name(path.name + PARTIAL)
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    try:
        yield aside
        files = [file for file in sorted(aside.rglob("*")) if file.is_file()]
        for file in files:
            sync(file)
        RecordedFolder(aside).seal(file.relative_to(aside).as_posix() for file in files)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if path.exists():
        path.rmdir()
    aside.rename(path)
    sync(path.parent)


def check_files(folder: Path) -> None:
    """Compare the files of a folder with its record, or with that of a folder it lies in.

    Texts that only people read are left to `fedmira verify`; a folder without a record is taken as
    it is.

    Args:
        folder: such as one of an adapter.

    Raises:
        RunFolderError: a file is damaged or gone.
    """
    place = folder.resolve()
    for above in (place, *place.parents[:_ABOVE]):
        if not (above / RECORD).is_file():
            continue
        recorded = RecordedFolder(above)
        start = "" if above == place else f"{place.relative_to(above).as_posix()}/"
        known = recorded.hashes()
        for name in known.files if known else ():
            if name.startswith(start) and not name.endswith(_FOR_PEOPLE):
                recorded.check(name)
