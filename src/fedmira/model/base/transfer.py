"""Small tensors on their way to the device, without a wait for what it still computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["on_device", "sent"]


_MOST_PINNED = 2**24
"""Pinned memory is kept for the life of the process."""


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor from the CPU on `device`.

    To CUDA a small one goes from pinned memory, so that the copy queues up behind earlier work.

    Args:
        tensor: any shape, on the CPU.
        device: where it goes.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.nbytes <= _MOST_PINNED:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def on_device(
    values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Numbers as a tensor there, [n].

    Args:
        values: the numbers, n of them.
        device: where the tensor is made.
        dtype: that of the tensor.
    """
    return sent(torch.tensor(values, dtype=dtype), device)
