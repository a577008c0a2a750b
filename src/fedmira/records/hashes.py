"""hashes.sha256: which SHA-256 each file of a folder has, in the form that `sha256sum -c` reads.

    <64 hex digits>  NAME
    # first N bytes of NAME: <64 hex digits>
    # all of the above: <64 hex digits>

A name stands twice while its file is being replaced: the old content or the new one is there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedmira.errors import RunFolderError

__all__ = ["RECORD", "Hashes", "parse_hashes"]

RECORD = "hashes.sha256"
"""The name of the file, in the folder whose files it lists."""

_FILE = re.compile(r"([0-9a-f]{64})  (.+)")
_BEGINNING = re.compile(r"# first (\d{1,18}) bytes of (.+): ([0-9a-f]{64})")
_SEAL = "# all of the above: "


@dataclass(frozen=True, slots=True)
class Hashes:
    """What is known of the files of a folder.

    Attributes:
        files: name, relative to the folder and with slashes -> the SHA-256 that it may have.
        beginnings: name of a file that grows -> bytes that are written for good, and their
            SHA-256.
    """

    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    beginnings: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    def with_files(self, changes: Mapping[str, tuple[str, ...]]) -> Hashes:
        """The same with some files' hashes replaced or added."""
        return Hashes({**self.files, **changes}, self.beginnings)

    def without(self, *names: str) -> Hashes:
        """The same without some files."""
        files = {name: found for name, found in self.files.items() if name not in names}
        return Hashes(files, self.beginnings)

    def text(self) -> str:
        """The record as it is written: files by name, then beginnings, then the seal over both."""
        lines = [f"{sha}  {name}\n" for name in sorted(self.files) for sha in self.files[name]]
        lines += [
            f"# first {size} bytes of {name}: {sha}\n"
            for name, (size, sha) in sorted(self.beginnings.items())
        ]
        above = "".join(lines)
        return f"{above}{_SEAL}{hashlib.sha256(above.encode()).hexdigest()}\n"


def parse_hashes(content: bytes, where: str, way_out: str) -> Hashes:
    """What a record says.

    Args:
        content: of the file.
        where: its path, for messages.
        way_out: what to do where it is damaged.

    Raises:
        RunFolderError: it is damaged, which its last line tells.
    """
    above, _, seal = content.rpartition(_SEAL.encode())
    if seal != f"{hashlib.sha256(above).hexdigest()}\n".encode():
        raise RunFolderError(
            f"{where}: the record of hashes is damaged (its last line does not fit the others); "
            f"{way_out}"
        )
    files: dict[str, tuple[str, ...]] = {}
    beginnings: dict[str, tuple[int, str]] = {}
    for line in above.decode().splitlines():
        if found := _FILE.fullmatch(line):
            files[found[2]] = (*files.get(found[2], ()), found[1])
        elif found := _BEGINNING.fullmatch(line):
            beginnings[found[2]] = (int(found[1]), found[3])
        else:
            raise RunFolderError(
                f"{where}: the line {line[:80]!r} is in no form that this version reads; read the "
                "folder with the version that wrote it"
            )
    return Hashes(files, beginnings)
