"""Attention over a packed row: prefix causal, every remainder against the prefix and itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from fedmira.model.packing import PackedBatch

__all__ = ["PACKED_ATTENTION", "packed_attention", "packed_layout"]

PACKED_ATTENTION = "fedmira_packed"
_layout: ContextVar[PackedBatch | None] = ContextVar("packed layout", default=None)


@contextmanager
def packed_layout(model: PreTrainedModel, batch: PackedBatch) -> Iterator[None]:
    """Within the block the model reads one flat packed row; its own attention is put back afterwards."""
    usual = model.config._attn_implementation
    token = _layout.set(batch)
    model.set_attn_implementation(PACKED_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)
        _layout.reset(token)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' AttentionInterface.

    Args:
        query: [1, heads, N, size]; key, value: [1, key heads, N, size], N tokens as `pack` lays them out.
        options: `sliding_window` is honoured.

    Raises:
        NotImplementedError: the architecture caps its scores or has attention sinks; the probe then chooses the padded path.

    Returns:
        [1, N, heads, size], and None for the weights.
    """
    layout = _layout.get()
    assert layout is not None, "packed attention is only used inside packed_layout"
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise NotImplementedError("soft-capped scores and attention sinks are not packed")
    window = options.get("sliding_window")
    outputs: list[Tensor] = []
    for segment, start in zip(layout.segments, layout.starts, strict=True):
        prefix, place = segment.prefix, start + segment.prefix
        prefix_key, prefix_value = key[0, :, start:place], value[0, :, start:place]
        if prefix:
            outputs.append(_attend(query[:, :, start:place], prefix_key[None], prefix_value[None], 0, window, scaling)[0])
        for group in segment.groups:
            rows, size = len(group.rows), group.size
            span = slice(place, place + rows * size)
            own_query, own_key, own_value = (_by_row(tensor[0, :, span], rows, size) for tensor in (query, key, value))
            if prefix:
                own_key = torch.cat([prefix_key.expand(rows, -1, -1, -1), own_key], dim=2)
                own_value = torch.cat([prefix_value.expand(rows, -1, -1, -1), own_value], dim=2)
            attended = _attend(own_query, own_key, own_value, prefix, window, scaling)
            outputs.append(attended.transpose(0, 1).flatten(1, 2))
            place = span.stop
    return torch.cat(outputs, dim=1).transpose(0, 1)[None], None


def _by_row(tensor: Tensor, rows: int, size: int) -> Tensor:
    """[heads, rows * size, width] -> [rows, heads, size, width]."""
    return tensor.view(len(tensor), rows, size, tensor.shape[-1]).transpose(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, offset: int, window: int | None, scaling: float | None) -> Tensor:
    """query [R, heads, S, width] at positions offset.., key and value [R, key heads, offset + S, width] -> [R, heads, S, width]."""
    rows, heads, size, width = query.shape
    groups = key.shape[1]
    share = heads // groups
    # Query heads that share a key head are folded into its rows, so keys are not copied.
    folded = query.reshape(rows, groups, share * size, width)
    mask = _mask(size, offset, share, window or 0, query.device, query.dtype)
    result = functional.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return result.reshape(rows, heads, size, width)


@lru_cache(maxsize=32)
def _mask(size: int, offset: int, share: int, window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Additive mask [share * size, offset + size]: 0 where a query sees a key, minus infinity elsewhere."""
    own = torch.arange(offset, offset + size, device=device)[:, None]
    other = torch.arange(offset + size, device=device)[None, :]
    seen = own >= other
    if window:
        seen &= own - other < window
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, float("-inf")).repeat(share, 1)


def _no_mask(*arguments: Any, **options: Any) -> None:
    """The layout alone decides who sees whom."""


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
