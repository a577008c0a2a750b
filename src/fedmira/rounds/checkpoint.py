"""Checkpoints: everything that resume needs, written in one atomic step after each round."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmira.adapters import Adapter
from fedmira.algorithms import ServerState
from fedmira.errors import RunFolderError
from fedmira.messages import ClientId, Payload

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]

_TENSORS, _VALUES = "tensors.safetensors", "values.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after `round`.

    Attributes:
        memories: the clients' private memories that the engine keeps.
        uploaded: each client's last adapter before alignment; best: its adapter at its best validation loss.
        values: plain JSON values of the recorder, such as file sizes and best losses.
    """

    round: int
    state: ServerState
    memories: Mapping[ClientId, Payload] = field(default_factory=dict)
    uploaded: Mapping[ClientId, Adapter] = field(default_factory=dict)
    best: Mapping[ClientId, Adapter] = field(default_factory=dict)
    values: Mapping[str, object] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `folder`/round-N and remove older rounds; a crash at any moment leaves a whole checkpoint behind."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"round-{checkpoint.round:06d}"
    partial = folder / f"{final.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    # Clients may hold the very same tensors; safetensors wants every entry on its own.
    save_file({name: tensor.contiguous().clone() for name, tensor in _flatten(checkpoint)}, partial / _TENSORS)
    scalars = {client: dict(memory.scalars) for client, memory in checkpoint.memories.items()}
    (partial / _VALUES).write_text(
        json.dumps({"round": checkpoint.round, "scalars": scalars, "values": dict(checkpoint.values)}), encoding="utf-8"
    )
    for path in (partial / _TENSORS, partial / _VALUES, partial):
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _flush(folder)
    for old in folder.iterdir():
        if old != final:
            shutil.rmtree(old)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`, or None where there is none.

    Raises:
        RunFolderError: the newest checkpoint is damaged.
    """
    rounds = sorted(path for path in folder.glob("round-*") if path.suffix != ".partial") if folder.is_dir() else []
    if not rounds:
        return None
    newest = rounds[-1]
    try:
        tensors = load_file(newest / _TENSORS)
        values = json.loads((newest / _VALUES).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise RunFolderError(f"{newest}: the checkpoint is damaged ({error}); remove it to start the run again in a new folder") from error
    nested: dict[str, dict[str, dict[str, Tensor]]] = {}
    numbers: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        kind, owner, *rest = key.split("|")
        if kind == "numbers":
            numbers[owner] = tensor
        else:
            nested.setdefault(kind, {}).setdefault(owner, {})["|".join(rest)] = tensor
    memories = {
        client: Payload(_unfold(nested.get("memories", {}).get(client, {})), scalars) for client, scalars in values["scalars"].items()
    }
    state = ServerState(nested.get("adapters", {}), numbers)
    return Checkpoint(values["round"], state, memories, nested.get("uploaded", {}), nested.get("best", {}), values["values"])


def _flatten(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for kind, table in (("adapters", checkpoint.state.adapters), ("uploaded", checkpoint.uploaded), ("best", checkpoint.best)):
        for owner, adapter in table.items():
            yield from ((f"{kind}|{owner}|{name}", tensor) for name, tensor in adapter.items())
    yield from ((f"numbers|{name}", tensor) for name, tensor in checkpoint.state.numbers.items())
    for client, memory in checkpoint.memories.items():
        for part, adapter in memory.tensors.items():
            yield from ((f"memories|{client}|{part}|{name}", tensor) for name, tensor in adapter.items())


def _unfold(flat: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        part, name = key.split("|", 1)
        parts.setdefault(part, {})[name] = tensor
    return parts


def _flush(path: Path) -> None:
    """Have the disk hold what was written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
