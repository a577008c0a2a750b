"""Packed attention on CUDA: one call for all rows of all clients, nothing padded.

The call is PyTorch's variable-length flash attention.

A prefix is a sequence of its own. A remainder is a sequence of queries whose keys are its prefix's
and its own; the kernel aligns causal masks on the last key, so its first query sees the whole
prefix. Keys are gathered row by row, queries stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fedmira.model.base.transfer import on_device
from fedmira.model.packed.packing import PackedBatch

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn: Any = None  # type: ignore[no-redef]

_KNOWN = {"scale", "window_size", "enable_gqa"}
_AVAILABLE = (
    varlen_attn is not None and _KNOWN <= signature(varlen_attn).parameters.keys()
)  # torch 2.12 has all of them

__all__ = ["Sequences", "attend_on_cuda", "sequences_of", "varlen_available"]


@dataclass(frozen=True, slots=True)
class Sequences:
    """S sequences of queries and of keys.

    Attributes:
        keys: int64, the place in the flat row of every key of every sequence, one sequence after
            another.
        query_ends, key_ends: int32 [S + 1], where each sequence begins and ends.
        longest_query, longest_key: of all sequences.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int


def varlen_available(query: Tensor) -> bool:
    """Whether this torch has the kernel for the tensor's device and number type."""
    return (
        _AVAILABLE
        and query.device.type in ("cuda", "meta")
        and query.dtype in (torch.bfloat16, torch.float16)
    )


def sequences_of(batch: PackedBatch) -> Sequences:
    """The sequences of a packed batch, in the order of its tokens."""
    keys: list[int] = []
    query_sizes: list[int] = []
    key_sizes: list[int] = []
    for segment, start in zip(batch.segments, batch.starts, strict=True):
        prefix = range(start, start + segment.prefix)
        place = prefix.stop
        if segment.prefix:
            keys += prefix
            query_sizes.append(segment.prefix)
            key_sizes.append(segment.prefix)
        for length in segment.lengths:
            keys += prefix
            keys += range(place, place + length)
            query_sizes.append(length)
            key_sizes.append(segment.prefix + length)
            place += length
    device = batch.ids.device
    return Sequences(
        on_device(keys, device),
        on_device([0, *accumulate(query_sizes)], device, torch.int32),
        on_device([0, *accumulate(key_sizes)], device, torch.int32),
        max(query_sizes),
        max(key_sizes),
    )


def attend_on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attention of N tokens as `pack` lays them out.

    Args:
        query: [1, heads, N, size].
        key, value: [1, key heads, N, size].
        window: how many keys a query sees at most, itself included; None is all.
        sequences: starts and lengths of what sees itself.
        scale: factor of the scores before softmax.

    Returns:
        [1, N, heads, size].
    """
    keys, values = (tensor[0].transpose(0, 1)[sequences.keys] for tensor in (key, value))
    result = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        keys,
        values,
        sequences.query_ends,
        sequences.key_ends,
        sequences.longest_query,
        sequences.longest_key,
        scale=scale,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    assert isinstance(result, Tensor), "no auxiliary results were asked for"
    return result[None]
