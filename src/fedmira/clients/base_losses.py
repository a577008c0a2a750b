"""Losses of the base on clients' rows, kept in the cache folder for runs that begin alike."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata

import torch

from fedmira.config import cache_folder, distrusted
from fedmira.messages import ClientId
from fedmira.model import BaseModel, Row, machine_name
from fedmira.records import SealedFiles

__all__ = ["BaseLosses"]

_FORM = 1
_MOST_BYTES = 2**26
_log = logging.getLogger("fedmira")

RowLosses = dict[ClientId, list[float]]
"""Client -> the summed response loss of each of its rows in nats."""


class BaseLosses:
    """Keeps what the base gives on the rows of all clients, row by row.

    A file stands for all rows that were measured together, and its name for all that the bits
    depend on: the rows, the base, how its passes are made, versions, processor and threads. So what
    is read is what would be measured. `$FEDMIRA_CACHE` says where files lie, and switches them off.

    Attributes:
        read: the splits whose losses were read and not measured, for run.json.
    """

    def __init__(self) -> None:
        self.read: list[str] = []
        parent = cache_folder()
        folder = parent and parent / "base_losses"
        if folder is not None and folder.is_dir() and (reason := distrusted(folder)):
            _log.warning("%s: the cache of base losses is not used: %s", folder, reason)
            folder = None
        lost = "the base's losses are measured again"
        self._files = None if folder is None else SealedFiles(folder, ".json", _MOST_BYTES, lost)

    def rows(
        self,
        base: BaseModel,
        rows: Mapping[ClientId, Sequence[Row]],
        split: str,
        passes: Sequence[object],
        measured: Callable[[], RowLosses],
    ) -> RowLosses:
        """The losses of these rows, as they were kept or as they are measured now.

        Args:
            base: the frozen base.
            rows: of each client, in the order in which they are measured.
            split: what they are called in run.json.
            passes: further numbers that decide how rows are laid out in passes.
            measured: measures them.
        """
        if self._files is None:
            return measured()
        key = _key(base, rows, passes)
        content = self._files.read(key)
        if content is not None:
            self.read.append(split)
            found: RowLosses = json.loads(content)
            return found
        losses = measured()
        try:
            if not (self._files.folder.is_dir() and distrusted(self._files.folder)):
                self._files.write(key, json.dumps(losses).encode())
        except OSError as error:
            _log.warning("the base's losses cannot be kept (%s); later runs measure again", error)
        return losses


def _key(base: BaseModel, rows: Mapping[ClientId, Sequence[Row]], passes: Sequence[object]) -> str:
    hasher = hashlib.sha256()
    surroundings = (
        _FORM,
        [metadata.version(name) for name in ("fedmira", "torch", "transformers")],
        machine_name(base.device),
        torch.get_num_threads(),
        base.sha256,
        str(base.dtype),
        str(getattr(base.model.config, "quantization_config", None)),
        base.packed,
        base.attention,
        base.attention_in_windows,
        base.last_layer and base.last_layer.index,
        any("forward" in vars(module) for module in base.model.modules()),  # compiled
        *passes,
    )
    hasher.update(repr(surroundings).encode())
    for client, own in rows.items():
        lengths = [(len(row.prompt), len(row.response)) for row in own]
        hasher.update(repr((client, lengths)).encode())
        for row in own:
            hasher.update(array("i", (*row.prompt, *row.response)).tobytes())
    return hasher.hexdigest()
