"""Files of a cache: each begins with the SHA-256 of its name and content."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from fedmira.atomic import replace_file

__all__ = ["SealedFiles"]

_SEAL_BYTES = hashlib.sha256().digest_size
_log = logging.getLogger("fedmira")


class SealedFiles:
    """Files that can be made anew, in a folder that several processes may use at once.

    Args:
        folder: made by the first `write`, for its owner alone.
        suffix: the end of each file's name.
        most_bytes: of all files; the least recently written go when there are more.
        lost: what follows where a file is damaged, for the log.
    """

    def __init__(self, folder: Path, suffix: str, most_bytes: int, lost: str) -> None:
        self.folder = folder
        self._suffix, self._most_bytes, self._lost = suffix, most_bytes, lost
        self._has_room = False

    def read(self, key: str) -> bytes | None:
        """The content of a file; None where it is not there, or is not what was written.

        What is damaged is said in the log.

        Args:
            key: its name without the suffix.
        """
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        if content[:_SEAL_BYTES] != _seal(path, content[_SEAL_BYTES:]):
            _log.warning(
                "%s: the file is damaged, or an older version wrote it; %s", path, self._lost
            )
            return None
        return content[_SEAL_BYTES:]

    def write(self, key: str, content: bytes) -> None:
        """Keep a content under a key, and let old files go.

        Args:
            key: the name without the suffix.
            content: what `read` gives back.

        Raises:
            OSError: it cannot be kept, as on a full disk.
        """
        path = self._path(key)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        replace_file(path, _seal(path, content) + content, lasting=False, shared=True, mode=0o600)
        if not self._has_room:  # once in a run: listing the folder takes long when it holds much
            self._has_room = True
            self._make_room()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{self._suffix}"

    def _make_room(self) -> None:
        files = sorted(
            (file.stat().st_mtime, file.stat().st_size, file)
            for file in self.folder.iterdir()  # those of older versions, too
        )
        total = sum(size for _, size, _ in files)
        for _, size, file in files:
            if total <= self._most_bytes:
                return
            file.unlink(missing_ok=True)
            total -= size


def _seal(path: Path, content: bytes) -> bytes:
    """SHA-256 over what a file is called and what it holds: another file's content does not pass.

    Args:
        path: of the file.
        content: what stands behind the seal.
    """
    return hashlib.sha256(path.name.encode() + content).digest()
