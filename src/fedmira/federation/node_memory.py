"""A client's private memory in a folder of its node.

It survives a restart and never runs ahead of the server.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedmira.adapters import Adapter, content_hash
from fedmira.atomic import PARTIAL, replace_file
from fedmira.errors import RunFolderError
from fedmira.messages import ClientId, Payload, flattened, in_parts
from fedmira.records import machine_errors

__all__ = ["NodeMemory"]

_OF_A_ROUND = re.compile(r"round-(\d{6}|[1-9]\d{6,})\.safetensors")
_ABOUT, _SEAL = "memory", "sha256"
_LENGTH_BYTES = 8


class NodeMemory:
    """What one client remembers between the rounds of one run, a file a round.

    The last that the server accepted, and what came after.

    FOLDER/RUN/CLIENT/round-N.safetensors holds the tensors, their SHA-256 and the numbers. A file
    is written under another name and renamed when the disk holds it, so a crash leaves a whole one
    behind.

    Args:
        folder: of the node's choice; made by the first `keep`.
        run_id: memories of another run are neither read nor touched.
        client: the client's name.
    """

    def __init__(self, folder: Path, run_id: str, client: ClientId) -> None:
        self._place = {"run": run_id, "client": client}
        self.folder = folder / _file_name(run_id) / _file_name(client)

    def recall(self, accepted_round: int) -> Payload | None:
        """The memory as of the round whose reply the server last accepted from this client.

        The one before it stays, since a server whose last checkpoint is damaged goes back a round.
        All others are removed: what is newer belongs to replies that the server never used, and
        nobody asks for what is older again. Files of other names are neither read nor touched.

        Args:
            accepted_round: 0 where the server has accepted none.

        Returns:
            None before the first accepted round, or where the folder does not have this very round.

        Raises:
            RunFolderError: the file is damaged or belongs to another run or client.
            MachineError: the folder cannot be read or tidied.
        """
        accepted = self._path(accepted_round)
        with machine_errors():
            kept = {accepted_round, max(self._rounds(below=accepted_round), default=0)}
            for path in list(self.folder.glob("round-*")):
                found = _OF_A_ROUND.fullmatch(path.name.removesuffix(PARTIAL))
                if found and (path.suffix == PARTIAL or int(found[1]) not in kept):
                    path.unlink()
            present = accepted.exists()
        return self._read(accepted) if present else None

    def keep(self, round_number: int, memory: Payload) -> None:
        """Store the memory after a round, before its reply leaves.

        The one before stays until a `recall` says that it is not needed.

        Args:
            round_number: the round that the memory is of.
            memory: the client's private one.

        Raises:
            RunFolderError: the folder cannot be written.
        """
        flat = {
            key: tensor.detach().cpu().contiguous().clone()
            for key, tensor in flattened(memory.tensors).items()
        }
        about = json.dumps(
            {
                **self._place,
                "round": round_number,
                "parts": list(memory.tensors),
                "scalars": dict(memory.scalars),
            }
        )
        path = self._path(round_number)
        try:
            self.folder.parents[1].mkdir(parents=True, exist_ok=True)
            for folder in (self.folder.parent, self.folder):
                folder.mkdir(
                    mode=0o700, exist_ok=True
                )  # for this user's eyes: moments tell of rows
            replace_file(path, save(flat, {_ABOUT: about, _SEAL: _seal(about, flat)}))
        except OSError as error:
            raise RunFolderError(
                f"{path}: the client's private memory cannot be written ({error}); make "
                "room or choose another folder"
            ) from error

    def _rounds(self, below: int) -> list[int]:
        """Rounds before this one of which a memory is kept."""
        found = (_OF_A_ROUND.fullmatch(path.name) for path in self.folder.glob("round-*"))
        return [number for match in found if match and (number := int(match[1])) < below]

    def _path(self, number: int) -> Path:
        return self.folder / f"round-{number:06d}.safetensors"

    def _read(self, path: Path) -> Payload:
        """A memory, checked.

        Raises:
            RunFolderError: the file is damaged or belongs to another run or client.
        """
        with machine_errors():
            content = path.read_bytes()
        try:
            flat: dict[str, Tensor] = load(content)
            written = _metadata(content)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from error
        if written.get(_SEAL) != _seal(written.get(_ABOUT, ""), flat):
            raise _damaged(path, "its content does not have the SHA-256 that was written with it")
        about = json.loads(written[_ABOUT])
        if {key: about[key] for key in self._place} != self._place:
            raise _damaged(path, f"it belongs to run {about['run']!r}, client {about['client']!r}")
        return Payload(in_parts(flat, about["parts"]), about["scalars"])


def _metadata(content: bytes) -> dict[str, str]:
    """What stands in the header of a safetensors file beside its tensors."""
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    found = json.loads(content[_LENGTH_BYTES : _LENGTH_BYTES + length]).get("__metadata__")
    return dict(found or {})


def _seal(about: str, flat: Adapter) -> str:
    """SHA-256 over all that a file says."""
    return hashlib.sha256(f"{about} {content_hash(flat)}".encode()).hexdigest()


def _file_name(name: str) -> str:
    """A name as that of one file: letters, digits and -_ as they are, everything else as %XX."""
    return quote(name, safe="").replace(".", "%2E").replace("~", "%7E") or "%"


def _damaged(path: Path, reason: str) -> RunFolderError:
    return RunFolderError(
        f"{path}: the client's private memory cannot be read ({reason}); put the file "
        "back, or remove it and the client goes on without "
        "what it remembered"
    )
