"""Checkpoints: everything that resume needs, of the last two rounds.

A round writes the adapters that it changed and one atomic step makes them count. What is read back
is compared with its hash, and where the newest is damaged, a run goes on from the one before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedmira.adapters import Adapter
from fedmira.atomic import PARTIAL, replace_folder
from fedmira.errors import MachineError, RunFolderError
from fedmira.messages import ClientId, Payload
from fedmira.methods import ServerState
from fedmira.records import RECORD, Hashes, RecordedFolder, machine_errors
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
_KEPT = 2
"""Rounds that stay: where the newest is damaged, the other is as good, and a round older."""

_ROUND = re.compile(r"round-(\d{6}|[1-9]\d{6,})")
_WAY_OUT = (
    "put the files back from a copy, or start the run again in a new folder, from its config.toml"
)
_log = logging.getLogger("fedmira")


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
        beginnings: name of each growing file of the run folder -> its bytes, and their SHA-256.
    """

    round: int
    state: ServerState
    memories: Mapping[ClientId, Payload] = field(default_factory=dict)
    uploaded: Mapping[ClientId, Adapter] = field(default_factory=dict)
    best: Mapping[ClientId, Adapter] = field(default_factory=dict)
    values: Mapping[str, object] = field(default_factory=dict)
    graph_json: str = ""
    beginnings: Mapping[str, tuple[int, str]] = field(default_factory=dict)


class CheckpointFolder:
    """Where a run's checkpoints lie.

    `adapters/` holds every adapter that a checkpoint or the running round names, in files named by
    content; round-N/values.json says which adapter belongs to whom, and round-N/numbers.safetensors
    holds the numbers of the state; of large ones, only the rows that changed are written, beside
    the adapters. round-N/hashes.sha256 says what all of that must be, and how the growing files of
    the run folder began. The last two rounds stay.

    Args:
        path: made by the first `save`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = AdapterStore(path / _ADAPTERS)
        self._numbers = NumberStore(self.store)
        self._live: dict[int, set[str]] = {}  # round that stays -> the keys that it names

    def save(self, checkpoint: Checkpoint) -> None:
        """Write round-N, remove older rounds but one, then adapters that nobody names any more.

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
        hashes = {name: (hashlib.sha256(data).hexdigest(),) for name, data in files.items()}
        files[RECORD] = Hashes(hashes, checkpoint.beginnings).text().encode()
        replace_folder(self._place(checkpoint.round), files)
        self._live[checkpoint.round] = live
        self._keep_last(checkpoint.round)

    def load(
        self, lost: Callable[[Mapping[str, tuple[int, str]]], Sequence[str]] | None = None
    ) -> Checkpoint | None:
        """The newest checkpoint of which every byte is as it was written; None where none is there.

        Where a newer one is damaged, a warning says so. Adapters and memories are compared with
        their hashes here, and read when they are asked for.

        Args:
            lost: what growing files of the run folder no longer hold of these beginnings.

        Raises:
            RunFolderError: no checkpoint is whole, or another version wrote them.
            MachineError: one cannot be read.
        """
        problems: list[str] = []
        for number in sorted(self.rounds(), reverse=True):
            place = self._place(number)
            try:
                with machine_errors():
                    found = self._whole(place, self._numbers, lost)
            except RunFolderError as error:
                problems += error.problems
                continue
            for problem in problems:
                _log.warning("%s", problem)
            if problems:
                _log.warning("going on from the checkpoint before it, %s, which is whole", place)
            return found
        if problems:
            raise RunFolderError(problems)
        return None

    def rounds(self) -> dict[int, Path]:
        """Number -> folder of each round that is kept, whole or damaged."""
        found = {path: _ROUND.fullmatch(path.name) for path in self.path.glob("round-*")}
        return {int(match[1]): path for path, match in found.items() if match}

    def keys_of(self, number: int) -> set[str]:
        """The names of all files in adapters/ that a round needs, without their ending.

        Args:
            number: of the round.

        Raises:
            RunFolderError: its own files are damaged.
        """
        return set(_named(self._read(self._place(number))))

    def problems_of(self, number: int) -> list[str]:
        """What is damaged in a round, in its own files and those in adapters/ that it needs.

        Args:
            number: of the round.
        """
        try:
            self._whole(self._place(number), NumberStore(self.store))
        except RunFolderError as error:
            return list(error.problems)
        return []

    def _whole(
        self,
        place: Path,
        numbers: NumberStore,
        lost: Callable[[Mapping[str, tuple[int, str]]], Sequence[str]] | None = None,
    ) -> Checkpoint:
        """A checkpoint, compared with its hashes.

        Raises:
            RunFolderError: it is damaged, lacks something, or was written by another version.
        """
        recorded = RecordedFolder(place, _WAY_OUT)
        known = recorded.hashes()
        if known is not None and lost is not None and (told := lost(known.beginnings)):
            raise RunFolderError([f"{problem}; put it back from a copy" for problem in told])
        document = self._read(place)
        try:
            small = load(recorded.read(_NUMBERS))
            graph_json = recorded.read(_GRAPH).decode() if recorded.exists(_GRAPH) else ""
            keys = set(_named(document))
            if bad := [problem for key in sorted(keys) if (problem := self.store.problem(key))]:
                raise _damaged(place, "; ".join(bad[:3]))
            entries = {
                client: StoredMemory(key, tuple(parts), scalars)
                for client, (key, parts, scalars) in document["memories"].items()
            }
            state, uploaded, best = (
                AdapterTable(self.store, document["tables"][name])
                for name in ("state", "uploaded", "best")
            )
            large = numbers.get(document["large_numbers"])
            found = Checkpoint(
                round=document["round"],
                state=ServerState(state, {**small, **large}),
                memories=MemoryTable(self.store, entries),
                uploaded=uploaded,
                best=best,
                values=document["values"],
                graph_json=graph_json,
                beginnings=known.beginnings if known else {},
            )
        except (LookupError, TypeError, ValueError, SafetensorError) as error:
            raise _damaged(place, f"{type(error).__name__}: {error}") from error
        self._live[found.round] = keys
        return found

    def tidy(self, checkpoint: Checkpoint | None) -> None:
        """Remove what belongs to no checkpoint, before a run goes on from it.

        A power cut may have left adapters half on the disk that were written after the checkpoint;
        the same content would count as stored.

        Args:
            checkpoint: what `load` gave.
        """
        for half in self.path.glob(f"round-*{PARTIAL}"):
            shutil.rmtree(half)
        last = checkpoint.round if checkpoint else -1
        for number, place in self.rounds().items():
            # What is damaged is made anew, by the rounds that follow.
            if number > last or (number < last and self.problems_of(number)):
                _remove(place)
                self._live.pop(number, None)
        self._keep_last(last)
        self.store.remove_halves()

    def _stored(self, checkpoint: Checkpoint) -> tuple[dict[str, AdapterTable], MemoryTable]:
        """The checkpoint's adapters and memories, all in the store."""
        adapters = {
            "state": checkpoint.state.adapters,
            "uploaded": checkpoint.uploaded,
            "best": checkpoint.best,
        }
        tables = {name: AdapterTable.of(self.store, table) for name, table in adapters.items()}
        return tables, MemoryTable.of(self.store, checkpoint.memories)

    def _place(self, number: int) -> Path:
        return self.path / f"round-{number:06d}"

    def _keep_last(self, newest: int) -> None:
        """Remove rounds beyond those that stay, and then what no round names any more."""
        for number, place in sorted(self.rounds().items())[:-_KEPT]:
            if number != newest:
                _remove(place)
                self._live.pop(number, None)
        kept = self.rounds()
        for number in set(kept) - set(self._live):
            self._live[number] = self.keys_of(number)
        self.store.sweep({key for number in kept for key in self._live[number]})

    def _read(self, place: Path) -> Any:
        """values.json of a round.

        Raises:
            RunFolderError: it is damaged, or another version wrote it.
        """
        if (place / _FORMER_TENSORS).exists():
            raise _of_another_version(place)
        try:
            document = json.loads(RecordedFolder(place, _WAY_OUT).read(_VALUES).decode())
        except (ValueError, RecursionError) as error:
            raise _damaged(place, str(error)) from error
        except MachineError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise _damaged(place, str(error)) from error
            raise
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise _of_another_version(place)
        return document


def _remove(place: Path) -> None:
    """Remove a round; one that is removed by half is no round any more."""
    aside = place.with_name(place.name + PARTIAL)
    place.rename(aside)
    shutil.rmtree(aside)


def _named(document: Any) -> Iterator[str]:
    """Every key that values.json names."""
    for keys in document["tables"].values():
        yield from keys.values()
    for key, _, _ in document["memories"].values():
        yield key
    for place in document["large_numbers"].values():
        yield from place["patches"]


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


def _damaged(place: Path, reason: str) -> RunFolderError:
    return RunFolderError(f"{place}: the checkpoint is damaged ({reason}); {_WAY_OUT}")


def _of_another_version(newest: Path) -> RunFolderError:
    return RunFolderError(
        f"{newest}: the checkpoint was written by another version of fedmira, in a form "
        "that this one does not read (it reads form "
        f"{_FORMAT}); finish the run with the version in run.json, or start a new run"
    )
