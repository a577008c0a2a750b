"""The numbers of a server state on disk.

Of a large tensor, a checkpoint writes the rows that changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedmira.storage.table import AdapterStore

__all__ = ["LARGE_BYTES", "NumberStore"]

LARGE_BYTES = 2**20
"""Tensors above this are stored as patches.

Smaller ones go whole into the checkpoint of each round.
"""

_BLOCK_BYTES = 2**22
"""Most bytes of one patch, and of what is compared at a time."""

_MOST_PATCHED = 2
"""A tensor is stored anew once its patches hold this many times its rows."""


@dataclass(frozen=True, slots=True)
class _Patched:
    """A tensor as it was stored: patches over zeros, the later over the earlier.

    With it goes how many rows the patches hold together.
    """

    tensor: Tensor
    keys: tuple[str, ...]
    num_rows: int


class NumberStore:
    """Keeps large tensors beside the adapters, each as a chain of patches.

    A patch is {"rows": int64 [n], "values": [n, ...]}.

    Tensors of a state never change in place, so the last ones stay here by reference, to tell which
    rows are new.

    Args:
        store: where the patches go.
    """

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._last: dict[str, _Patched] = {}

    def put(self, numbers: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Store what changed since the last time.

        Returns:
            The small tensors, to be written by the caller, and for each large one where it lies, as
            JSON values.
        """
        large = {
            name
            for name, tensor in numbers.items()
            if tensor.ndim > 0 and tensor.numel() * tensor.element_size() > LARGE_BYTES
        }
        self._last = {
            name: self._patched(numbers[name], self._last.get(name)) for name in sorted(large)
        }
        small = {
            name: tensor.contiguous().clone()
            for name, tensor in numbers.items()
            if name not in large
        }
        return small, {
            name: {
                "shape": list(patched.tensor.shape),
                "dtype": str(patched.tensor.dtype).removeprefix("torch."),
                "patches": list(patched.keys),
                "rows": patched.num_rows,
            }
            for name, patched in self._last.items()
        }

    def get(self, places: Mapping[str, Any]) -> dict[str, Tensor]:
        """The large tensors that lie there, bit for bit.

        Raises:
            RunFolderError: a patch is missing or damaged.
        """
        self._last = {}
        for name, place in places.items():
            tensor = torch.zeros(place["shape"], dtype=getattr(torch, place["dtype"]))
            for key in place["patches"]:
                patch = self._store.get(key)
                tensor[patch["rows"]] = patch["values"]
            self._last[name] = _Patched(tensor, tuple(place["patches"]), place["rows"])
        return {name: patched.tensor for name, patched in self._last.items()}

    def _patched(self, tensor: Tensor, last: _Patched | None) -> _Patched:
        """The tensor, stored after `last`.

        Stored from zeros where that is another shape or has become long.
        """
        tensor = tensor.contiguous()
        if last is not None and (last.tensor.shape, last.tensor.dtype) == (
            tensor.shape,
            tensor.dtype,
        ):
            rows = _different_rows(tensor, last.tensor)
            if last.num_rows + len(rows) <= _MOST_PATCHED * len(tensor):
                return _Patched(
                    tensor, (*last.keys, *self._put_rows(tensor, rows)), last.num_rows + len(rows)
                )
        rows = _different_rows(tensor, None)
        return _Patched(tensor, tuple(self._put_rows(tensor, rows)), len(rows))

    def _put_rows(self, tensor: Tensor, rows: Tensor) -> Iterator[str]:
        """The keys of patches that hold these rows."""
        for block in torch.split(rows, _rows_of_block(tensor)) if len(rows) else ():
            yield self._store.put({"rows": block, "values": tensor[block]})


def _rows_of_block(tensor: Tensor) -> int:
    return max(1, _BLOCK_BYTES // (tensor[0].numel() * tensor.element_size()))


def _different_rows(tensor: Tensor, other: Tensor | None) -> Tensor:
    """Rows with other bits than those of `other`, or than zeros, int64."""
    step, found = _rows_of_block(tensor), []
    for first in range(0, len(tensor), step):
        bits = _bits(tensor[first : first + step])
        different = (
            bits.any(dim=1)
            if other is None
            else (bits != _bits(other[first : first + step])).any(dim=1)
        )
        found.append(torch.nonzero(different).flatten() + first)
    return torch.cat(found)


def _bits(rows: Tensor) -> Tensor:
    """The bytes of every row, uint8 [rows, bytes]."""
    return rows.reshape(len(rows), -1).view(torch.uint8)
