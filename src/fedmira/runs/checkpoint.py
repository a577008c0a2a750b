"""Checkpoints: everything that resume needs.

A round writes the adapters that it changed and one atomic step makes them count.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedmira.adapters import Adapter
from fedmira.atomic import PARTIAL, replace_folder
from fedmira.errors import RunFolderError
from fedmira.messages import ClientId, Payload
from fedmira.methods import ServerState
from fedmira.storage import AdapterStore, AdapterTable, MemoryTable, NumberStore, StoredMemory

__all__ = ["Checkpoint", "CheckpointFolder"]

_ADAPTERS, _NUMBERS, _VALUES, _GRAPH = (
    "adapters",
    "numbers.safetensors",
    "values.json",
    "graph.json",
)
_FORMER_TENSORS = "tensors.safetensors"
_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after `round`.

    Attributes:
        round: its number, from 1; 0 before the first.
        state: of the server.
        memories: the clients' private memories that the engine keeps.
        uploaded: each client's last adapter before alignment.
        best: each client's adapter at its best validation loss.
        values: plain JSON values of the recorder, such as file sizes and best losses.
        graph_json: the content of graph.json; empty where no graph has acted.
    """

    round: int
    state: ServerState
    memories: Mapping[ClientId, Payload] = field(default_factory=dict)
    uploaded: Mapping[ClientId, Adapter] = field(default_factory=dict)
    best: Mapping[ClientId, Adapter] = field(default_factory=dict)
    values: Mapping[str, object] = field(default_factory=dict)
    graph_json: str = ""


class CheckpointFolder:
    """Where a run's checkpoints lie.

    `adapters/` holds every adapter that a checkpoint or the running round names, in files named by
    content; round-N/values.json says which adapter belongs to whom, and round-N/numbers.safetensors
    holds the numbers of the state; of large ones, only the rows that changed are written, beside
    the adapters. Only the newest round stays.

    Args:
        path: made by the first `save`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = AdapterStore(path / _ADAPTERS)
        self._numbers = NumberStore(self.store)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write round-N, remove older rounds and then the adapters that nobody names any more.

        A crash at any moment leaves a whole checkpoint behind: adapters reach the disk before the
        round that names them is renamed into place, and are removed after the round that named
        them.
        """
        tables, memories = self._stored(checkpoint)
        numbers, large_numbers = self._numbers.put(checkpoint.state.numbers)
        live = set(_keys(tables, memories, large_numbers))
        self.store.flush(live)
        document = {
            "format": _FORMAT,
            "round": checkpoint.round,
            "tables": {name: dict(table.hashes) for name, table in tables.items()},
            "memories": {
                client: [entry.key, entry.parts, entry.scalars]
                for client, entry in memories.entries.items()
            },
            "large_numbers": large_numbers,
            "values": checkpoint.values,
        }
        files = {_VALUES: json.dumps(document).encode(), _NUMBERS: save(numbers)}
        if checkpoint.graph_json:
            files[_GRAPH] = checkpoint.graph_json.encode()
        self._replace_round(checkpoint.round, files)
        self.store.sweep(live)

    def load(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None where there is none.

        Adapters and memories are read when they are asked for.

        Raises:
            RunFolderError: the newest checkpoint is damaged, lacks an adapter, or was written by
                another version.
        """
        rounds = sorted(path for path in self.path.glob("round-*") if path.suffix != PARTIAL)
        if not rounds:
            return None
        newest = rounds[-1]
        try:
            document = self._read(newest)
            numbers = load((newest / _NUMBERS).read_bytes())
            graph_json = (
                (newest / _GRAPH).read_text(encoding="utf-8") if (newest / _GRAPH).exists() else ""
            )
        except (OSError, SafetensorError, ValueError) as error:
            raise _damaged(newest, str(error)) from error
        tables = {name: AdapterTable(self.store, keys) for name, keys in document["tables"].items()}
        entries = {
            client: StoredMemory(key, tuple(parts), scalars)
            for client, (key, parts, scalars) in document["memories"].items()
        }
        memories = MemoryTable(self.store, entries)
        for key in _keys(tables, memories, document["large_numbers"]):
            if key not in self.store:
                raise _damaged(newest, f"{self.store.folder.name}/{key}.safetensors is missing")
        state = ServerState(
            tables["state"], {**numbers, **self._numbers.get(document["large_numbers"])}
        )
        return Checkpoint(
            round=document["round"],
            state=state,
            memories=memories,
            uploaded=tables["uploaded"],
            best=tables["best"],
            values=document["values"],
            graph_json=graph_json,
        )

    def tidy(self, checkpoint: Checkpoint | None) -> None:
        """Remove what belongs to no checkpoint, before a run goes on from it.

        A power cut may have left adapters half on the disk that were written after the checkpoint;
        the same content would count as stored.

        Args:
            checkpoint: what `load` gave.
        """
        live = (
            set(_keys(*self._stored(checkpoint), self._numbers.put(checkpoint.state.numbers)[1]))
            if checkpoint
            else set()
        )
        self.store.sweep(live)
        self.store.remove_halves()
        for half in self.path.glob(f"round-*{PARTIAL}"):
            shutil.rmtree(half)

    def _stored(self, checkpoint: Checkpoint) -> tuple[dict[str, AdapterTable], MemoryTable]:
        """The checkpoint's adapters and memories, all in the store."""
        adapters = {
            "state": checkpoint.state.adapters,
            "uploaded": checkpoint.uploaded,
            "best": checkpoint.best,
        }
        tables = {name: AdapterTable.of(self.store, table) for name, table in adapters.items()}
        return tables, MemoryTable.of(self.store, checkpoint.memories)

    def _replace_round(self, number: int, files: Mapping[str, bytes]) -> None:
        """Put round-N with these files in place of all older rounds."""
        final = self.path / f"round-{number:06d}"
        replace_folder(final, files)
        for old in self.path.glob("round-*"):
            if old != final:
                shutil.rmtree(old)

    def _read(self, newest: Path) -> Any:
        """values.json of a round.

        Raises:
            RunFolderError: another version wrote it.
        """
        if (newest / _FORMER_TENSORS).exists():
            raise _of_another_version(newest)
        document = json.loads((newest / _VALUES).read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise _of_another_version(newest)
        return document


def _keys(
    tables: Mapping[str, AdapterTable], memories: MemoryTable, large_numbers: Mapping[str, Any]
) -> Iterator[str]:
    """Every key that a checkpoint names."""
    for table in tables.values():
        yield from table.hashes.values()
    for entry in memories.entries.values():
        yield entry.key
    for place in large_numbers.values():
        yield from place["patches"]


def _damaged(newest: Path, reason: str) -> RunFolderError:
    return RunFolderError(
        f"{newest}: the checkpoint is damaged ({reason}); remove it to start the run again "
        "in a new folder"
    )


def _of_another_version(newest: Path) -> RunFolderError:
    return RunFolderError(
        f"{newest}: the checkpoint was written by another version of fedmira, in a form "
        "that this one does not read (it reads form "
        f"{_FORMAT}); finish the run with the version in run.json, or start a new run"
    )
