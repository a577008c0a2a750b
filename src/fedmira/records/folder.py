"""A folder whose files are written by one writer and read by one reader, which compares hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from fedmira.atomic import replace_file
from fedmira.errors import MachineError, RunFolderError
from fedmira.records.hashes import RECORD, Hashes, parse_hashes
from fedmira.records.machine import machine_errors

__all__ = ["RecordedFolder", "changed", "sha256_of"]

_BLOCK = 2**20
_WAY_OUT = (
    "put it back from a copy, or, where you changed it yourself: fedmira verify FOLDER --accept "
    "NAME"
)
_ATTEMPTS = 3
"""Another process may replace a file between the look at its hash and that at its content."""


class RecordedFolder:
    """Files of one folder, with their SHA-256 in its hashes.sha256.

    A hash is written before the content that has it, and the former one stays beside it until the
    next write, so that whatever ends the process, the file that is there has a hash that is known.
    One process at a time may write.
    Files that are in no record, such as those of older versions, are read as they are.

    Args:
        path: the folder.
        way_out: what to do where a file is damaged; NAME in it stands for the file.
    """

    def __init__(self, path: Path, way_out: str = _WAY_OUT) -> None:
        self.path = path
        self._way_out = way_out
        self._read: tuple[tuple[int, int, int], Hashes] | None = None

    def hashes(self) -> Hashes | None:
        """What is recorded; None where nothing ever was.

        Raises:
            RunFolderError: the record is damaged.
            MachineError: it cannot be read.
        """
        place = self.path / RECORD
        try:
            with machine_errors():
                about = place.stat()
                version = (about.st_ino, about.st_mtime_ns, about.st_size)
                if self._read is not None and self._read[0] == version:
                    return self._read[1]  # a run of thousands of clients has a long one
                content = place.read_bytes()
        except MachineError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return None
            raise
        self._read = (version, parse_hashes(content, str(place), self._told("all")))
        return self._read[1]

    def write(self, name: str, content: str | bytes, *, lasting: bool = True) -> None:
        """Put a file with this content in the place of another, and record its hash.

        Args:
            name: relative to the folder, with slashes; its own folder is there.
            content: text is written as UTF-8.
            lasting: the disk holds the file when this returns.

        Raises:
            OSError: it cannot be written; the old file is as it was.
            RunFolderError: the record is damaged.
        """
        data = content.encode("utf-8") if isinstance(content, str) else content
        new, known = hashlib.sha256(data).hexdigest(), self._settled()
        present = known.files.get(name, ())
        if present != (new,):
            self._record(known.with_files({name: (*present, new)}))
        replace_file(self.path / name, data, lasting=lasting)

    def seal(self, names: Iterable[str]) -> None:
        """Record these files as they lie there, and one hash of each of those that are known.

        Args:
            names: relative to the folder; of files that others wrote.
        """
        found = {name: (sha256_of(self.path / name),) for name in names}
        self._record(self._settled().with_files(found))

    def release(self, chosen: Callable[[str], bool]) -> None:
        """Forget the hashes of files that are about to change by other hands than this writer's.

        Args:
            chosen: whether a name is one of them.
        """
        known = self.hashes()
        if known is not None and (names := [name for name in known.files if chosen(name)]):
            self._record(known.without(*names))

    def read(self, name: str) -> bytes:
        """A file's content, which has the recorded hash.

        Args:
            name: relative to the folder, with slashes.

        Raises:
            RunFolderError: it is damaged or gone.
            MachineError: it cannot be read, or is not there and in no record.
        """
        for _ in range(_ATTEMPTS):
            known = self._recorded(name)
            content = self._content(name, known)
            found = hashlib.sha256(content).hexdigest()
            if not known or found in known:
                return content
        raise changed(self.path, name, self._way_out)

    def check(self, name: str) -> None:
        """Compare a file with its record, where it has one, block by block.

        Raises:
            RunFolderError: it is damaged or gone.
        """
        if self._recorded(name):
            for _ in range(_ATTEMPTS):
                known = self._recorded(name)
                path = self.path / name
                with machine_errors():
                    if not path.is_file():
                        raise self._gone(name)
                    if not known or sha256_of(path) in known:
                        return
            raise changed(self.path, name, self._way_out)

    def exists(self, name: str) -> bool:
        """Whether a file is there.

        Raises:
            RunFolderError: it is not, and should be.
        """
        if (self.path / name).is_file():
            return True
        if self._recorded(name) and not (self.path / name).is_file():
            raise self._gone(name)
        return False

    def _told(self, name: str) -> str:
        return self._way_out.replace("FOLDER", str(self.path)).replace("NAME", name)

    def _gone(self, name: str) -> RunFolderError:
        return RunFolderError(
            f"{self.path / name}: the file is missing, though {RECORD} lists it; "
            + self._way_out.partition(", or, where you changed")[0]
        )

    def _recorded(self, name: str) -> tuple[str, ...]:
        known = self.hashes()
        return known.files.get(name, ()) if known else ()

    def _content(self, name: str, known: tuple[str, ...]) -> bytes:
        try:
            with machine_errors():
                return (self.path / name).read_bytes()
        except MachineError as error:
            if known and isinstance(error.__cause__, FileNotFoundError):
                raise self._gone(name) from error
            raise

    def _settled(self) -> Hashes:
        """The record, with the one hash that is true of each file that has two in it."""
        known = self.hashes() or Hashes()
        open_ = {name: several for name, several in known.files.items() if len(several) > 1}
        true = {}
        for name, several in open_.items():
            path = self.path / name
            present = sha256_of(path) if path.is_file() else ""
            # What has neither hash is damaged, and stays so.
            true[name] = (present,) if present in several else several[-1:]
        return known.with_files(true) if true else known

    def _record(self, hashes: Hashes) -> None:
        # Always held by the disk: all files of the folder stand in it.
        replace_file(self.path / RECORD, hashes.text())


def sha256_of(path: Path, first: int | None = None) -> str:
    """SHA-256 of a file, or of its first bytes, in 64 hex digits.

    Args:
        path: the file.
        first: how many bytes; all by default. A file that has fewer gives the hash of those.
    """
    hasher, left = hashlib.sha256(), first
    with path.open("rb") as file:
        while block := file.read(_BLOCK if left is None else min(_BLOCK, left)):
            hasher.update(block)
            left = None if left is None else left - len(block)
    return hasher.hexdigest()


def changed(folder: Path, name: str, way_out: str = _WAY_OUT) -> RunFolderError:
    """The error of a file whose content is not what was written.

    Args:
        folder: that records its hash.
        name: of the file, relative to the folder.
        way_out: what to do; NAME in it stands for the file.
    """
    return RunFolderError(
        f"{folder / name}: the file is damaged or was changed: its SHA-256 is not the one in "
        f"{RECORD}; {way_out.replace('FOLDER', str(folder)).replace('NAME', name)}"
    )
