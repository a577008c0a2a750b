"""How a change of a tensor is written in fewer bits, and read back on every machine.

The bits that are read are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmira.adapters.low_rank import UP
from fedmira.errors import WireError

__all__ = ["CHANGE", "COMPRESSIONS", "SCALE", "Array", "Compression", "as_tensor"]

Array = np.ndarray[Any, np.dtype[Any]]

CHANGE, SCALE = "change", "scale"
"""What the arrays of a compressed tensor are called."""

_LARGEST = 127


@dataclass(frozen=True, slots=True)
class Compression:
    """One way of writing a float32 tensor in fewer bits.

    Attributes:
        pack: (parameter name, finite float32 tensor) -> named arrays.
        unpack: (parameter name, arrays, shape) -> float32 tensor of that shape; deterministic,
            element by element.
    """

    pack: Callable[[str, Tensor], dict[str, Array]]
    unpack: Callable[[str, Mapping[str, Array], torch.Size], Tensor]


def _halves(name: str, tensor: Tensor) -> dict[str, Array]:
    """Rounded to float16; what is too large for it becomes infinite, which the caller sees."""
    return {CHANGE: tensor.to(torch.float16).numpy()}


def _from_halves(name: str, arrays: Mapping[str, Array], shape: torch.Size) -> Tensor:
    return _read(name, arrays, CHANGE, torch.float16, shape).to(torch.float32)


def _bytes(name: str, tensor: Tensor) -> dict[str, Array]:
    """Whole numbers -127 to 127, half to even.

    A float32 scale stands for each direction of the adapter.

    A direction is a row of A or a column of B, so both factors of rank r have r scales: s = max |x|
    / 127, q = round(x / s).
    """
    scale = (
        tensor.abs().amax(dim=_within_direction(name, tensor), keepdim=True) / _LARGEST
        if tensor.numel()
        else _no_scale(name, tensor)
    )
    counts = (
        torch.where(scale > 0, tensor / scale, 0.0)
        .round()
        .clamp(-_LARGEST, _LARGEST)
        .to(torch.int8)
    )
    return {CHANGE: counts.numpy(), SCALE: scale.flatten().numpy()}


def _from_bytes(name: str, arrays: Mapping[str, Array], shape: torch.Size) -> Tensor:
    counts = _read(name, arrays, CHANGE, torch.int8, shape)
    of_scale = _no_scale(name, counts).shape
    scale = _read(name, arrays, SCALE, torch.float32, torch.Size([of_scale.numel()]))
    return counts.to(torch.float32) * scale.reshape(of_scale)


def _within_direction(name: str, tensor: Tensor) -> tuple[int, ...]:
    """The axes over which one scale holds: all where the tensor is no matrix."""
    if tensor.dim() != 2:
        return tuple(range(tensor.dim()))
    return (0,) if name.endswith(UP) else (1,)


def _no_scale(name: str, tensor: Tensor) -> Tensor:
    """Zeros in the shape of the scales, float32, with 1 for each axis over which a scale holds."""
    within = _within_direction(name, tensor)
    return torch.zeros([1 if axis in within else size for axis, size in enumerate(tensor.shape)])


def _read(
    name: str, arrays: Mapping[str, Array], what: str, dtype: torch.dtype, shape: torch.Size
) -> Tensor:
    """One array as a tensor, when it is there with this type and shape.

    Raises:
        WireError: it is not.
    """
    array = arrays.get(what)
    if array is None:
        raise WireError(f"{name}: the message has no {what}; needs one of shape {tuple(shape)}")
    expected = str(dtype).removeprefix("torch.")
    if array.dtype.name != expected or not array.dtype.isnative or array.shape != tuple(shape):
        raise WireError(
            f"{name}: its {what} is {array.dtype.name} {array.shape}; must be {expected} "
            f"{tuple(shape)}"
        )
    return as_tensor(array)


def as_tensor(array: Array) -> Tensor:
    """A tensor with a copy of the array, in one piece also where it holds nothing."""
    copied = torch.tensor(array)
    return copied if copied.numel() else torch.zeros(array.shape, dtype=copied.dtype)


COMPRESSIONS: Mapping[str, Compression] = {
    "float16": Compression(_halves, _from_halves),
    "int8": Compression(_bytes, _from_bytes),
}
"""Format -> how it writes a change; "float32" is not here, because it sends tensors whole."""
