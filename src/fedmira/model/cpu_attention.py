"""Packed attention on a CPU: PyTorch's flash kernel on views of the flat row, without a copy of any key.

Causal parts (a prefix, and each remainder by itself) are cut into blocks of queries that read only the keys before them. What a
remainder reads of its prefix is one call for all remainders of a segment. The two parts of a remainder are joined by their
log-sum-exps (Dao et al. 2022, section 3.1), with which the kernel's backward is exact for each part on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedmira.model.packing import PackedBatch

__all__ = ["attend_on_cpu"]

_BLOCK = 64
"""Queries of one causal call: few, so that little is computed above the diagonal, and enough for the kernel."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_on_cpu(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, scale: float, skip_prefix: bool) -> Tensor:
    """Attention of N tokens as `pack` lays them out.

    Args:
        query: [1, heads, N, size]; key, value: [1, key heads, N, size].
        skip_prefix: nobody reads the result at prefix tokens; it is zero there.

    Returns:
        [1, N, heads, size].
    """
    result: Tensor = _PackedAttention.apply(query, key, value, _parts(batch, skip_prefix), scale)  # type: ignore[no-untyped-call]
    return result


def _parts(batch: PackedBatch, skip_prefix: bool) -> list[tuple[slice, slice, list[slice]]]:
    """Per segment the places of its prefix, of all its remainders, and of what is causal by itself."""
    parts = []
    for segment, start in zip(batch.segments, batch.starts, strict=True):
        place = start + segment.prefix
        prefix, causal = slice(start, place), []
        if segment.prefix and not skip_prefix:
            causal.append(prefix)
        for length in segment.lengths:
            causal.append(slice(place, place + length))
            place += length
        parts.append((prefix, slice(prefix.stop, place), causal))
    return parts


def _blocks(causal: slice) -> Iterator[tuple[slice, slice]]:
    """Queries and the keys they read, block by block."""
    for begin in range(causal.start, causal.stop, _BLOCK):
        end = min(begin + _BLOCK, causal.stop)
        yield slice(begin, end), slice(causal.start, end)


@lru_cache(maxsize=512)
def _mask(size: int, offset: int, dtype: torch.dtype) -> Tensor:
    """Additive causal mask [size, offset + size] of queries at positions offset and on."""
    return torch.full((size, offset + size), float("-inf"), dtype=dtype).triu(offset + 1)


class _PackedAttention(torch.autograd.Function):
    """Heads stand as [key heads, query heads of each, N, size] throughout, which are views of the model's own tensors."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: list[tuple[slice, slice, list[slice]]], scale: float) -> Tensor:
        queries, keys, values = _by_key_head(query, key, value)
        groups, share, tokens, size = queries.shape
        out = query.new_zeros(tokens, groups, share, size)
        log_sums = torch.zeros(groups, share, tokens)
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.parts, ctx.scale = parts, scale
        flat, out = out, out.permute(1, 2, 0, 3)
        for prefix, remainders, causal in parts:
            for part in causal:
                for own, seen in _blocks(part):
                    mask = _mask(own.stop - own.start, own.start - seen.start, query.dtype)
                    out[:, :, own], log_sums[:, :, own] = _forward(
                        queries[:, :, own], keys[:, :, seen], values[:, :, seen], 0.0, False, attn_mask=mask, scale=scale
                    )
            if prefix.stop > prefix.start:
                to_prefix, log_sum = _forward(queries[:, :, remainders], keys[:, :, prefix], values[:, :, prefix], 0.0, False, scale=scale)
                share_of_prefix = torch.sigmoid(log_sum - log_sums[:, :, remainders])[..., None].to(query.dtype)
                out[:, :, remainders] = torch.lerp(out[:, :, remainders], to_prefix, share_of_prefix)
                log_sums[:, :, remainders] = torch.logaddexp(log_sums[:, :, remainders], log_sum)
        return flat.view(1, tokens, groups * share, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sums = ctx.saved_tensors
        queries, keys, values = _by_key_head(query, key, value)
        groups, share, tokens, size = queries.shape
        out, grad = out.permute(1, 2, 0, 3), grad.view(tokens, groups, share, size).permute(1, 2, 0, 3)
        to_query = torch.zeros(tokens, groups, share, size)  # sums in float32, whatever the model computes in
        to_key, to_value = torch.zeros(tokens, groups, size), torch.zeros(tokens, groups, size)
        sums = (to_query.permute(1, 2, 0, 3), to_key.transpose(0, 1), to_value.transpose(0, 1))

        def add(own: slice, seen: slice, mask: Tensor | None) -> None:
            of_own = [tensor[:, :, own] for tensor in (grad, queries)]
            of_seen = [tensor[:, :, seen] for tensor in (keys, values)]
            parts = _backward(*of_own, *of_seen, out[:, :, own], log_sums[:, :, own], 0.0, False, attn_mask=mask, scale=ctx.scale)
            sums[0][:, :, own] += parts[0]
            sums[1][:, seen] += parts[1].sum(dim=1)
            sums[2][:, seen] += parts[2].sum(dim=1)

        for prefix, remainders, causal in ctx.parts:
            for part in causal:
                for own, seen in _blocks(part):
                    add(own, seen, _mask(own.stop - own.start, own.start - seen.start, query.dtype))
            if prefix.stop > prefix.start:
                add(remainders, prefix, None)
        heads = (to_query.view(1, tokens, groups * share, size), to_key[None], to_value[None])
        return (*(tensor.transpose(1, 2).to(query.dtype) for tensor in heads), None, None)


def _by_key_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = key.shape[1]
    share = query.shape[1] // groups
    return query[0].unflatten(0, (groups, share)), *(tensor[0][:, None].expand(-1, share, -1, -1) for tensor in (key, value))
