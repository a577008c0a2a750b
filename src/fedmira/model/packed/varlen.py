"""PyTorch's variable-length flash attention on CUDA, and one call of it for all rows of a pass.

A prefix is a sequence of its own. A remainder is a sequence of queries whose keys are its prefix's
and its own; the kernel aligns causal masks on the last key, so its first query sees the whole
prefix. Keys are gathered row by row, queries stay where they are.

torch 2.12 and later want to be told of key heads that several query heads share; torch 2.11 takes
them as they are and knows no such argument. Earlier releases have no windows, by which a causal
mask is told, so there the kernel is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fedmira.model.base.transfer import on_device
from fedmira.model.packed.packing import PackedBatch

try:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn
except ImportError:
    varlen_attn: Any = None  # type: ignore[no-redef]
    AuxRequest: Any = None  # type: ignore[no-redef]

__all__ = [
    "Sequences",
    "Stretches",
    "attend_copied",
    "flat_heads",
    "sequences_of",
    "sums_available",
    "varlen",
    "varlen_available",
    "why_not",
]


@dataclass(frozen=True, slots=True)
class Stretches:
    """Where the sequences of queries and of keys begin and end in what the kernel is given.

    Attributes:
        query_ends, key_ends: int32 [S + 1].
        longest_query, longest_key: of all S sequences.
    """

    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, queries: list[int], keys: list[int], device: torch.device) -> Stretches:
        """Sequences of those sizes, one after another.

        Args:
            queries, keys: size of each sequence.
            device: where the ends are read.
        """
        ends = [
            on_device([0, *accumulate(sizes)], device, torch.int32) for sizes in (queries, keys)
        ]
        return cls(ends[0], ends[1], max(queries), max(keys))


@dataclass(frozen=True, slots=True)
class Sequences:
    """S sequences of queries and of keys.

    Attributes:
        keys: int64, the place in the flat row of every key of every sequence, one sequence after
            another.
        stretches: where each sequence begins and ends.
    """

    keys: Tensor
    stretches: Stretches


def varlen_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch has the kernel for the device and number type.

    The meta device has all that CUDA has.

    Args:
        device: where attention runs.
        dtype: of queries, keys and values.
    """
    return not why_not(device, dtype)


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernel is not used there, and what to do; "" where it is.

    Args:
        device: where attention runs.
        dtype: of queries, keys and values.
    """
    if device.type not in ("cuda", "meta"):
        return f"there is none for {device.type}"
    if not {"scale", "window_size"} <= _arguments(varlen_attn):
        return (
            f"torch {torch.__version__} has none with windows; install torch 2.11 or later for it"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        return (
            f"there is none for {str(dtype).removeprefix('torch.')}; set model.dtype to 'bfloat16' "
            "for it"
        )
    return ""


def sums_available() -> bool:
    """Whether this torch gives log-sum-exps of the kernel, and its backward on its own."""
    return "return_aux" in _arguments(varlen_attn) and hasattr(
        torch.ops.aten, "_flash_attention_backward"
    )


@lru_cache(maxsize=4)
def _arguments(function: Callable[..., Any] | None) -> frozenset[str]:
    return frozenset(signature(function).parameters) if function is not None else frozenset()


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stretches: Stretches,
    scale: float,
    window_size: tuple[int, int],
    with_sums: bool = False,
) -> Any:
    """Attention of sequences of unlike length.

    Args:
        query: [Q, heads, size].
        key, value: [T, key heads, size].
        stretches: which queries see which keys.
        scale: factor of the scores before softmax.
        window_size: how many keys a query sees before and behind its own place, -1 for all; places
            are counted from the last key.
        with_sums: whether log-sum-exps are asked for.

    Returns:
        [Q, heads, size], and with sums also float32 [heads, Q].
    """
    options: dict[str, Any] = {"scale": scale, "window_size": window_size}
    if "enable_gqa" in _arguments(varlen_attn):
        options["enable_gqa"] = key.shape[1] != query.shape[1]
    if with_sums:
        options["return_aux"] = AuxRequest(lse=True)
    return varlen_attn(
        query,
        key,
        value,
        stretches.query_ends,
        stretches.key_ends,
        stretches.longest_query,
        stretches.longest_key,
        **options,
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
    return Sequences(on_device(keys, device), Stretches.of(query_sizes, key_sizes, device))


def attend_copied(
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
    result = varlen(
        flat_heads(query).contiguous(),
        flat_heads(key)[sequences.keys],
        flat_heads(value)[sequences.keys],
        sequences.stretches,
        scale,
        (window - 1 if window else -1, 0),
    )
    assert isinstance(result, Tensor), "no auxiliary results were asked for"
    return result[None]


def flat_heads(tensor: Tensor) -> Tensor:
    """[1, heads, N, size] as a view [N, heads, size]."""
    return tensor.squeeze(0).transpose(0, 1)
