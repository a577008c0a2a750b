"""Packed attention on a CPU: PyTorch's flash kernel on views of the flat row.

No key is copied.

A prefix, and a long remainder, is cut into blocks of queries that read only the keys before them;
short remainders lie beside each other in one block, whose mask keeps them apart. What remainders
read of their prefix is one call for all of a segment. The two parts of a remainder are joined by
their log-sum-exps (Dao et al. 2022, section 3.1), with which the kernel's backward is exact for
each part on its own. The kernel always computes in float32: in bfloat16 its backward takes two and
a half times as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedmira.model.packed.packing import PackedBatch

__all__ = ["CpuPlan", "attend_on_cpu", "plan_for_cpu"]

_BLOCK = 128
"""Queries of one causal call.

Few, so that little is computed above the diagonal, and enough for the kernel and for Python.
"""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """The kernel calls of one packed batch, the same in every layer that reads the same queries.

    Attributes:
        causal: queries, keys and mask of prefixes and of remainders, each seeing itself only; every
            query stands in one of them.
        to_prefixes: the queries of a segment's remainders, and the prefix they all see.
    """

    causal: tuple[tuple[slice, slice, Tensor], ...]
    to_prefixes: tuple[tuple[slice, slice], ...]


def plan_for_cpu(batch: PackedBatch, predicting: bool = False) -> CpuPlan:
    """Cut a packed batch into kernel calls.

    Args:
        predicting: whether the queries are those at `batch.predict_at` alone, in that order, or
            those of all tokens.
        batch: the packed rows.
    """
    causal: list[tuple[slice, slice, Tensor]] = []
    to_prefixes: list[tuple[slice, slice]] = []
    queries = 0  # that are planned
    for segment, start in zip(batch.segments, batch.starts, strict=True):
        place = start + segment.prefix
        if not predicting:
            causal += _blocks(start, place, start, queries)
            queries += segment.prefix
        before = queries
        # Who predicts stands at the end of its row.
        silent = [
            length - len(row.response) if predicting else 0
            for row, length in zip(segment.rows, segment.lengths, strict=True)
        ]
        for first, lengths in _side_by_side(segment.lengths):
            stop = place + sum(lengths)
            mute = silent[first : first + len(lengths)]
            if len(lengths) == 1:
                causal += _blocks(place + mute[0], stop, place, queries)
            else:
                count = sum(lengths) - sum(mute)
                causal.append(
                    (
                        slice(queries, queries + count),
                        slice(place, stop),
                        _beside(lengths, tuple(mute)),
                    )
                )
            queries += sum(lengths) - sum(mute)
            place = stop
        if segment.prefix:
            to_prefixes.append((slice(before, queries), slice(start, start + segment.prefix)))
    return CpuPlan(tuple(causal), tuple(to_prefixes))


def attend_on_cpu(query: Tensor, key: Tensor, value: Tensor, plan: CpuPlan, scale: float) -> Tensor:
    """Attention of N tokens as `pack` lays them out.

    Args:
        query: [1, heads, Q, size], the queries that the plan is for.
        key, value: [1, key heads, N, size].
        plan: the kernel calls of `plan_for_cpu`.
        scale: factor of the scores before softmax.

    Returns:
        [1, Q, heads, size].
    """
    result: Tensor = _PackedAttention.apply(query, key, value, plan, scale)  # type: ignore[no-untyped-call]
    return result


def _side_by_side(lengths: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Neighbours that fit one block together, with the number of the first.

    A longer one stands alone.
    """
    first = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or sum(lengths[first : end + 1]) > _BLOCK:
            yield first, tuple(lengths[first:end])
            first = end


def _blocks(
    begin: int, stop: int, start: int, queries: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Places `begin` to `stop` of a causal stretch from `start`, block by block.

    Queries, keys up to the last of them, and the mask.

    Args:
        queries: number of the first query.
    """
    for place in range(begin, stop, _BLOCK):
        end = min(place + _BLOCK, stop)
        own = slice(queries + place - begin, queries + end - begin)
        yield own, slice(start, end), _causal(end - place, place - start)


def _causal(size: int, offset: int) -> Tensor:
    """Additive mask [size, offset + size] of queries at positions offset and on.

    A view of one mask for all offsets of a size class.
    """
    widest = _BLOCK * (offset // _BLOCK + 1)
    return _widest_mask(widest)[:size, widest - offset : widest + size]


@lru_cache(maxsize=64)
def _widest_mask(offset: int) -> Tensor:
    return torch.full((_BLOCK, offset + _BLOCK), float("-inf")).triu(offset + 1)


@lru_cache(maxsize=64)
def _beside(lengths: tuple[int, ...], silent: tuple[int, ...]) -> Tensor:
    """Additive mask of rows beside each other, each causal and blind for the others.

    The first `silent` places of a row do not ask.
    """
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = _causal(len(row), 0).masked_fill(row[:, None] != row[None, :], float("-inf"))
    asks = torch.cat(
        [torch.arange(length) >= first for length, first in zip(lengths, silent, strict=True)]
    )
    return mask[asks]


class _PackedAttention(torch.autograd.Function):
    """Heads as [key heads, query heads of each, N, size], views of the model's own tensors."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: CpuPlan, scale: float
    ) -> Tensor:
        queries, keys, values = _by_key_head(query.float(), key.float(), value.float())
        groups, share, asking, size = queries.shape
        flat = torch.empty(asking, groups, share, size)
        out, log_sums = flat.permute(1, 2, 0, 3), torch.empty(groups, share, asking)
        for own, seen, mask in plan.causal:
            out[:, :, own], log_sums[:, :, own] = _forward(
                queries[:, :, own],
                keys[:, :, seen],
                values[:, :, seen],
                0.0,
                False,
                attn_mask=mask,
                scale=scale,
            )
        for own, seen in plan.to_prefixes:
            to_prefix, log_sum = _forward(
                queries[:, :, own], keys[:, :, seen], values[:, :, seen], 0.0, False, scale=scale
            )
            to_itself, own_log_sum = out[:, :, own], log_sums[:, :, own]
            to_itself.lerp_(to_prefix, torch.sigmoid(log_sum - own_log_sum)[..., None])
            own_log_sum.copy_(torch.logaddexp(own_log_sum, log_sum))
        result = flat.view(1, asking, groups * share, size).to(query.dtype)
        ctx.save_for_backward(query, key, value, result, log_sums)
        ctx.plan, ctx.scale = plan, scale
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, log_sums = ctx.saved_tensors
        queries, keys, values = _by_key_head(query.float(), key.float(), value.float())
        groups, share, asking, size = queries.shape
        out, grad = (
            tensor.float().view(asking, groups, share, size).permute(1, 2, 0, 3)
            for tensor in (result, grad)
        )
        to_query = torch.empty(asking, groups, share, size)
        to_key, to_value = torch.zeros(2, keys.shape[2], groups, size)
        by_head = (to_query.permute(1, 2, 0, 3), to_key.transpose(0, 1), to_value.transpose(0, 1))
        plan: CpuPlan = ctx.plan
        for number, (own, seen, *mask) in enumerate((*plan.causal, *plan.to_prefixes)):
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
            (
                by_head[0][:, :, own].copy_
                if number < len(plan.causal)
                else by_head[0][:, :, own].add_
            )(parts[0])
            by_head[1][:, seen] += parts[1].sum(dim=1)
            by_head[2][:, seen] += parts[2].sum(dim=1)
        heads = (to_query.view(1, asking, groups * share, size), to_key[None], to_value[None])
        return (*(tensor.transpose(1, 2).to(query.dtype) for tensor in heads), None, None)


def _by_key_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = key.shape[1]
    share = query.shape[1] // groups
    by_group = query[0].view(groups, share, *query.shape[2:])
    by_key, by_value = (tensor[0][:, None].expand(-1, share, -1, -1) for tensor in (key, value))
    return by_group, by_key, by_value
