"""Arithmetic on adapters, which are mappings from parameter name to float32 tensor.

No adapter is ever changed in place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

__all__ = [
    "Adapter",
    "DIGEST_DIGITS",
    "HashedAdapter",
    "all_finite",
    "content_hash",
    "digest",
    "distance",
    "dot_products",
    "map_tensors",
    "norm",
    "same_shapes",
    "subtract",
    "weighted_sum",
]

Adapter = Mapping[str, Tensor]
"""Parameter name -> float32 CPU tensor: exactly the trainable part."""

DIGEST_DIGITS = 16
"""Of the 64 hex digits of a content hash, those that stand in events.jsonl."""


def map_tensors(function: Callable[..., Tensor], *adapters: Adapter) -> dict[str, Tensor]:
    """Apply `function` name by name; all adapters must have the names of the first.

    Args:
        function: takes one tensor of each adapter, in their order, and gives the new tensor.
        adapters: one or more, of equal names.
    """
    return {name: function(*(adapter[name] for adapter in adapters)) for name in adapters[0]}


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """Sum of weight * adapter, in the tensors' own dtype.

    It is summed in the given order in float64.

    >>> import torch
    >>> from fedmira.adapters import weighted_sum
    >>> weighted_sum([{"A": torch.tensor([2.0])}, {"A": torch.tensor([4.0])}], [0.5, 0.5])
    {'A': tensor([3.])}

    Args:
        adapters: one or more, of equal names and shapes.
        weights: one for each adapter; they need not sum to 1.
    """

    def combine(*tensors: Tensor) -> Tensor:
        total = torch.zeros(tensors[0].shape, dtype=torch.float64)
        for tensor, weight in zip(tensors, weights, strict=True):
            total.add_(tensor.to(torch.float64), alpha=weight)
        return total.to(tensors[0].dtype)

    return map_tensors(combine, *adapters)


def subtract(left: Adapter, right: Adapter) -> dict[str, Tensor]:
    """left - right, name by name.

    Args:
        left: what is taken from.
        right: what is taken away, of equal names and shapes.
    """
    return map_tensors(torch.sub, left, right)


def norm(adapter: Adapter) -> float:
    """Euclidean norm over all tensors, in float64."""
    return float(
        sum(float(tensor.to(torch.float64).square().sum()) for tensor in adapter.values()) ** 0.5
    )


def distance(left: Adapter, right: Adapter) -> float:
    """Euclidean distance between two adapters of equal shapes.

    Args:
        left: one end.
        right: the other end.
    """
    return norm(subtract(left, right))


def dot_products(rows: Sequence[Adapter], columns: Sequence[Adapter]) -> Tensor:
    """Euclidean inner products between two lists of adapters of one shape, float64 [rows, columns].

    Summed in order of the names, so that an adapter read back from a file gives the same bits.

    Args:
        rows: adapters, one for each row of the result.
        columns: adapters, one for each column.
    """
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    if not rows or not columns:
        return total
    for name in sorted(rows[0]):
        left, right = (
            torch.stack([adapter[name].flatten() for adapter in side]).to(torch.float64)
            for side in (rows, columns)
        )
        total += left @ right.T
    return total


def all_finite(adapter: Adapter) -> bool:
    """Whether no tensor holds a NaN or an infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in adapter.values())


def same_shapes(left: Adapter, right: Adapter) -> bool:
    """Whether both adapters have the same names with the same shapes.

    Args:
        left: an adapter.
        right: the adapter that it is held against.
    """
    return {name: tensor.shape for name, tensor in left.items()} == {
        name: tensor.shape for name, tensor in right.items()
    }


class HashedAdapter(Mapping[str, Tensor]):
    """An adapter that knows its content hash, so that it is computed once.

    Its tensors must not be changed in place.

    Args:
        tensors: the adapter.
        sha256: its `content_hash`.
    """

    __slots__ = ("_tensors", "sha256")

    def __init__(self, tensors: Adapter, sha256: str) -> None:
        self._tensors = dict(tensors)
        self.sha256 = sha256

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def content_hash(adapter: Adapter) -> str:
    """SHA-256 in 64 hex digits over names, shapes and bytes, in order of the names."""
    if isinstance(adapter, HashedAdapter):
        return adapter.sha256
    hasher = hashlib.sha256()
    for name in sorted(adapter):
        tensor = adapter[name].detach().cpu().contiguous()
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def digest(adapter: Adapter) -> str:
    """The first DIGEST_DIGITS hex digits of the content hash."""
    return content_hash(adapter)[:DIGEST_DIGITS]
