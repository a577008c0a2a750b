"""Packed attention on a CPU: PyTorch's flash kernel on views of the flat row, without a copy of any key.

A prefix, and a long remainder, is cut into blocks of queries that read only the keys before them; short remainders lie beside
each other in one block, whose mask keeps them apart. What remainders read of their prefix is one call for all of a segment. The
two parts of a remainder are joined by their log-sum-exps (Dao et al. 2022, section 3.1), with which the kernel's backward is exact
for each part on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedmira.model.packing import PackedBatch

__all__ = ["CpuPlan", "attend_on_cpu", "plan_for_cpu"]

_BLOCK = 128
"""Queries of one causal call: few, so that little is computed above the diagonal, and enough for the kernel and for Python."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """The kernel calls of one packed batch, the same in every layer.

    Attributes:
        of_prefixes: queries, keys and mask of the causal blocks of all prefixes.
        of_remainders: the same of all remainders, each seeing itself only.
        to_prefixes: the remainders of a segment, and the prefix they all see.
    """

    of_prefixes: tuple[tuple[slice, slice, Tensor], ...]
    of_remainders: tuple[tuple[slice, slice, Tensor], ...]
    to_prefixes: tuple[tuple[slice, slice], ...]


def plan_for_cpu(batch: PackedBatch, dtype: torch.dtype) -> CpuPlan:
    """Cut a packed batch into kernel calls.

    Args:
        dtype: of the masks, which is that of the queries.
    """
    of_prefixes: list[tuple[slice, slice, Tensor]] = []
    of_remainders: list[tuple[slice, slice, Tensor]] = []
    to_prefixes = []
    for segment, start in zip(batch.segments, batch.starts, strict=True):
        place = start + segment.prefix
        of_prefixes += _blocks(start, place, dtype)
        if segment.prefix:
            to_prefixes.append((slice(place, place + sum(segment.lengths)), slice(start, place)))
        for lengths in _side_by_side(segment.lengths):
            stop = place + sum(lengths)
            if len(lengths) == 1:
                of_remainders += _blocks(place, stop, dtype)
            else:
                of_remainders.append((slice(place, stop), slice(place, stop), _beside(lengths, dtype)))
            place = stop
    return CpuPlan(tuple(of_prefixes), tuple(of_remainders), tuple(to_prefixes))


def attend_on_cpu(query: Tensor, key: Tensor, value: Tensor, plan: CpuPlan, scale: float, skip_prefixes: bool = False) -> Tensor:
    """Attention of N tokens as `pack` lays them out.

    Args:
        query: [1, heads, N, size]; key, value: [1, key heads, N, size].
        skip_prefixes: nobody reads the result at prefix tokens; it is zero there.

    Returns:
        [1, N, heads, size].
    """
    result: Tensor = _PackedAttention.apply(query, key, value, plan, scale, skip_prefixes)  # type: ignore[no-untyped-call]
    return result


def _side_by_side(lengths: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Neighbours that fit one block together; a longer one stands alone."""
    group: list[int] = []
    for length in lengths:
        if group and sum(group) + length > _BLOCK:
            yield tuple(group)
            group = []
        group.append(length)
    yield tuple(group)


def _blocks(start: int, stop: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """A causal stretch, block by block: queries, the keys up to the last of them, and the mask."""
    for begin in range(start, stop, _BLOCK):
        end = min(begin + _BLOCK, stop)
        yield slice(begin, end), slice(start, end), _causal(end - begin, begin - start, dtype)


def _causal(size: int, offset: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [size, offset + size] of queries at positions offset and on: a view of one mask for all offsets of a size class."""
    widest = _BLOCK * (offset // _BLOCK + 1)
    return _widest_mask(widest, dtype)[:size, widest - offset : widest + size]


@lru_cache(maxsize=64)
def _widest_mask(offset: int, dtype: torch.dtype) -> Tensor:
    return torch.full((_BLOCK, offset + _BLOCK), float("-inf"), dtype=dtype).triu(offset + 1)


@lru_cache(maxsize=64)
def _beside(lengths: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Additive mask of rows beside each other, each causal and blind for the others."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = _causal(len(row), 0, dtype)
    return mask.masked_fill(row[:, None] != row[None, :], float("-inf"))


class _PackedAttention(torch.autograd.Function):
    """Heads stand as [key heads, query heads of each, N, size] throughout, which are views of the model's own tensors."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: CpuPlan, scale: float, skip_prefixes: bool) -> Tensor:
        queries, keys, values = _by_key_head(query, key, value)
        groups, share, tokens, size = queries.shape
        flat = query.new_zeros(tokens, groups, share, size) if skip_prefixes else query.new_empty(tokens, groups, share, size)
        out, log_sums = flat.permute(1, 2, 0, 3), torch.empty(groups, share, tokens)
        ctx.save_for_backward(query, key, value, flat, log_sums)
        ctx.plan, ctx.scale, ctx.skip_prefixes = plan, scale, skip_prefixes
        for own, seen, mask in (*(() if skip_prefixes else plan.of_prefixes), *plan.of_remainders):
            out[:, :, own], log_sums[:, :, own] = _forward(
                queries[:, :, own], keys[:, :, seen], values[:, :, seen], 0.0, False, attn_mask=mask, scale=scale
            )
        for own, seen in plan.to_prefixes:
            to_prefix, log_sum = _forward(queries[:, :, own], keys[:, :, seen], values[:, :, seen], 0.0, False, scale=scale)
            to_itself, own_log_sum = out[:, :, own], log_sums[:, :, own]
            to_itself.lerp_(to_prefix, torch.sigmoid(log_sum - own_log_sum)[..., None].to(query.dtype))
            own_log_sum.copy_(torch.logaddexp(own_log_sum, log_sum))
        return flat.view(1, tokens, groups * share, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, flat, log_sums = ctx.saved_tensors
        queries, keys, values = _by_key_head(query, key, value)
        groups, share, tokens, size = queries.shape
        out, grad = flat.permute(1, 2, 0, 3), grad.view(tokens, groups, share, size).permute(1, 2, 0, 3)
        # Sums in float32, whatever the model computes in.
        to_query = torch.zeros(tokens, groups, share, size) if ctx.skip_prefixes else torch.empty(tokens, groups, share, size)
        to_key, to_value = torch.zeros(2, tokens, groups, size)
        by_head = (to_query.permute(1, 2, 0, 3), to_key.transpose(0, 1), to_value.transpose(0, 1))
        plan: CpuPlan = ctx.plan
        causal = (*(() if ctx.skip_prefixes else plan.of_prefixes), *plan.of_remainders)
        for number, (own, seen, *mask) in enumerate((*causal, *plan.to_prefixes)):
            parts = _backward(
                grad[:, :, own],
                queries[:, :, own],
                keys[:, :, seen],
                values[:, :, seen],
                out[:, :, own],
                log_sums[:, :, own],
                0.0,
                False,
                attn_mask=mask[0] if mask else None,
                scale=ctx.scale,
            )
            # Every query stands in one causal call; what it reads of a prefix comes on top.
            (by_head[0][:, :, own].copy_ if number < len(causal) else by_head[0][:, :, own].add_)(parts[0])
            by_head[1][:, seen] += parts[1].sum(dim=1)
            by_head[2][:, seen] += parts[2].sum(dim=1)
        heads = (to_query.view(1, tokens, groups * share, size), to_key[None], to_value[None])
        return (*(tensor.transpose(1, 2).to(query.dtype) for tensor in heads), None, None, None)


def _by_key_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = key.shape[1]
    share = query.shape[1] // groups
    by_group = query[0].view(groups, share, *query.shape[2:])
    by_key, by_value = (tensor[0][:, None].expand(-1, share, -1, -1) for tensor in (key, value))
    return by_group, by_key, by_value
