"""A file that grows by whole lines, and is held against what a checkpoint knows of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fedmira.errors import RunFolderError
from fedmira.records.folder import RecordedFolder, sha256_of
from fedmira.records.hashes import RECORD

__all__ = ["GrowingFile", "lost_lines"]

_BLOCK = 2**20


def lost_lines(folder: Path) -> list[str]:
    """What the growing files of a run no longer hold of what its newest checkpoint says of them.

    Args:
        folder: of a run; one that has ended has these files in its own record, too, which is then
            what counts, as somebody may have accepted there what he changed.
    """
    try:
        own = RecordedFolder(folder).hashes()
    except RunFolderError:
        own = None  # a damaged record is told by whoever reads a file that it lists
    recorded = own.files if own else {}
    rounds = (place.parent for place in (folder / "checkpoint").glob(f"round-*/{RECORD}"))
    numbers = {place.name.removeprefix("round-"): place for place in rounds}
    for number in sorted(filter(str.isdecimal, numbers), key=int, reverse=True):
        try:
            found = RecordedFolder(numbers[number]).hashes()
        except RunFolderError:
            continue  # a damaged checkpoint is told by whoever needs it; the one before it will do
        return [
            problem
            for name, (size, sha256) in (found.beginnings.items() if found else ())
            if name not in recorded
            and (problem := GrowingFile(folder / name).problem(size, sha256))
        ]
    return []


class GrowingFile:
    """Appends lines, and keeps the SHA-256 of all that is there.

    Args:
        path: of the file; made by the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hasher = hashlib.sha256()
        self._size: int | None = None  # of what the hasher has seen; None before it saw anything

    def append(self, data: bytes) -> None:
        """Add lines; the disk holds them when this returns, as a checkpoint counts on it.

        Args:
            data: whole lines.
        """
        size = self._seen()
        with self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._hasher.update(data)
        self._size = size + len(data)

    def beginning(self) -> tuple[int, str]:
        """Bytes of the file, and their SHA-256 in 64 hex digits."""
        return self._seen(), self._hasher.hexdigest()

    def problem(self, size: int, sha256: str) -> str:
        """Why the first bytes are not those that were written; "" where they are.

        Args:
            size: how many bytes.
            sha256: of these, in 64 hex digits.
        """
        present = self.path.stat().st_size if self.path.exists() else 0
        if present < size:
            return f"{self.path}: has {present} bytes, of which {size} were written: it was cut"
        if size and sha256_of(self.path, first=size) != sha256:
            return f"{self.path}: is damaged: its first {size} bytes are not those written"
        return ""

    def cut_back(self, size: int) -> None:
        """Drop what stands behind the first bytes.

        Args:
            size: how many stay.

        Raises:
            RunFolderError: there are fewer.
        """
        present = self.path.stat().st_size if self.path.exists() else 0
        if present < size:
            raise RunFolderError(
                f"{self.path}: has {present} bytes, of which {size} were written: it was cut; put "
                "it back from a copy, or start a new run"
            )
        if self.path.exists():
            os.truncate(self.path, size)
        self._size = None

    def _seen(self) -> int:
        """Bytes of the file, all of which the hasher has seen."""
        present = self.path.stat().st_size if self.path.exists() else 0
        if self._size != present:
            self._hasher = hashlib.sha256()
            if present:
                with self.path.open("rb") as file:
                    while block := file.read(_BLOCK):
                        self._hasher.update(block)
            self._size = present
        return present
