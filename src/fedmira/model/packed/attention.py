"""Attention over a packed row: prefix causal, every remainder against the prefix and itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from fedmira.model.packed.cpu import CpuPlan, attend_on_cpu, plan_for_cpu
from fedmira.model.packed.joined import JoinedPlan, attend_joined, joined_plan
from fedmira.model.packed.packing import PackedBatch
from fedmira.model.packed.varlen import (
    Sequences,
    attend_copied,
    sequences_of,
    sums_available,
    varlen_available,
)

__all__ = [
    "ATTENTION",
    "PACKED_ATTENTION",
    "Layout",
    "attention_ways",
    "layers_seen",
    "packed_attention",
    "packed_layout",
    "refuse_what_is_not_told",
]

PACKED_ATTENTION = "fedmira_packed"
ATTENTION = {
    "joined": "two variable-length calls, prefixes and remainders, joined by log-sum-exps",
    "copied": "one variable-length call, a prefix's keys copied for each row behind it",
    "blocks": "the processor's flash kernel, blocks of queries",
    "rows": "a call for each row",
    "own": "the model's own, on padded rows",
}
"""How attention may run, by the names that run.json has."""


Masks = dict[tuple[int, int, int, int, torch.dtype], Tensor]
"""Made for one pass and forgotten with it: of long rows each takes many megabytes."""


@dataclass
class Layout:
    """What the layers of one pass share, also where they run a second time.

    Attributes:
        last_layer: index of a layer whose result is read at `batch.predict_at` only; None reads
            every place.
        attention: one of `attention_ways`; others, such as "", are the fastest of these.
        batch: the packed rows.
        plans: kernel calls, made once a pass.
        masks: attention masks, made once a pass.
    """

    batch: PackedBatch
    last_layer: int | None = None
    attention: str = ""
    plans: dict[bool, CpuPlan] = field(default_factory=dict)
    masks: Masks = field(default_factory=dict)

    @cached_property
    def sequences(self) -> Sequences:
        """What the kernel on CUDA is told where keys are copied."""
        return sequences_of(self.batch)

    @cached_property
    def joined(self) -> JoinedPlan:
        """What it is told where parts are joined."""
        return joined_plan(self.batch)

    def cpu_plan(self, predicting: bool) -> CpuPlan:
        """What the kernels on a CPU are told, see `plan_for_cpu`."""
        if predicting not in self.plans:
            self.plans[predicting] = plan_for_cpu(self.batch, predicting)
        return self.plans[predicting]


_layout: ContextVar[Layout | None] = ContextVar("packed layout", default=None)
_seen: ContextVar[dict[int, tuple[bool, str]] | None] = ContextVar("layers seen", default=None)


@lru_cache(maxsize=16)
def attention_ways(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The ways of `ATTENTION` that packed passes may take there, the fastest first.

    Args:
        device: where attention runs.
        dtype: of queries, keys and values.
    """
    if device.type == "cpu":
        return ("blocks", "rows")
    if not varlen_available(device, dtype):
        return ("rows",)
    return ("joined", "copied", "rows") if sums_available() else ("copied", "rows")


@contextmanager
def layers_seen() -> Iterator[dict[int, tuple[bool, str]]]:
    """Within the block, the layers whose attention is packed are noted.

    By index: whether a layer has a window, and the way that its attention runs where rows are
    longer than that.

    A layer that mixes tokens in another way, such as a state space, knows nothing of rows that
    stand behind each other.
    """
    found: dict[int, tuple[bool, str]] = {}
    token = _seen.set(found)
    try:
        yield found
    finally:
        _seen.reset(token)


@contextmanager
def packed_layout(model: PreTrainedModel, layout: Layout) -> Iterator[None]:
    """Within the block the model reads one flat packed row.

    Its own attention is put back afterwards.

    Args:
        model: the frozen model.
        layout: what the layers of the pass share.
    """
    usual = model.config._attn_implementation
    token = _layout.set(layout)
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
        module: the attention layer that calls.
        query: [1, heads, N, size], N tokens as `pack` lays them out.
        key, value: [1, key heads, N, size].
        attention_mask: not read; the layout says who sees whom.
        scaling: factor of the scores; None is 1 / sqrt(size).
        dropout: that of the attention; taken from the call and not applied.
        options: `sliding_window` is honoured.

    Raises:
        NotImplementedError: see `refuse_what_is_not_told`; the probe then chooses the padded path.

    Returns:
        [1, N, heads, size], and None for the weights.
    """
    layout = _layout.get()
    assert layout is not None, "packed attention is only used inside packed_layout"
    refuse_what_is_not_told(module, options)
    batch = layout.batch
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = options.get("sliding_window")
    ways = attention_ways(query.device, query.dtype)
    wanted = layout.attention if layout.attention in ways else ways[0]
    one_size = query.shape[-1] == value.shape[-1]
    if (seen := _seen.get()) is not None:
        seen[int(module.layer_idx)] = bool(window), _way(wanted, one_size, window)  # type: ignore[arg-type]
    if window and window >= max(
        segment.prefix + max(segment.lengths) for segment in batch.segments
    ):
        window = None
    match _way(wanted, one_size, window):
        case "joined":
            return attend_joined(query, key, value, layout.joined, scale), None
        case "copied":
            return attend_copied(query, key, value, layout.sequences, scale, window), None
        case "blocks":
            last = module.layer_idx == layout.last_layer
            return _attend_in_blocks(query, key, value, layout, scale, last), None
    return _attend_by_row(query, key, value, batch, scale, window, layout.masks), None


def _way(wanted: str, one_size: bool, window: int | None) -> str:
    """The wanted way, or the next one that can do this.

    Args:
        one_size: whether values have as many entries as keys, as all kernels want.
        window: how many keys a query sees at most; None is all.
    """
    if not one_size:
        return "rows"
    return {"joined": "copied", "blocks": "rows"}.get(wanted, wanted) if window else wanted


def _attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, last: bool
) -> Tensor:
    """On a CPU; of the last layer only what predicts is read.

    There all other places give nothing but keys and values.
    """
    if not last:
        return attend_on_cpu(query, key, value, layout.cpu_plan(False), scale)
    places = layout.batch.predict_at
    read = attend_on_cpu(query[:, :, places], key, value, layout.cpu_plan(True), scale)
    return read.new_zeros(1, query.shape[2], *read.shape[2:]).index_copy(1, places, read)


def refuse_what_is_not_told(module: nn.Module, options: Mapping[str, Any]) -> None:
    """Refuse architectures whose attention is more than its arguments say.

    Args:
        module: the attention layer that calls.
        options: what transformers hands to the layer's attention beside its tensors.

    Raises:
        NotImplementedError: the scores are capped, there are attention sinks, or a window stands in
            the config and would come with a mask only, which packed passes do not ask for.
    """
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise NotImplementedError("soft-capped scores and attention sinks are not packed")
    config = getattr(module, "config", None)
    if getattr(config, "attention_chunk_size", None) or (
        getattr(config, "sliding_window", None) and "sliding_window" not in options
    ):
        raise NotImplementedError("a window that the attention itself is not told is not packed")


def _attend_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: PackedBatch,
    scale: float,
    window: int | None,
    masks: Masks,
) -> Tensor:
    """The plain way, for every device: one call for a prefix and one for each remainder."""
    outputs: list[Tensor] = []
    for segment, start in zip(batch.segments, batch.starts, strict=True):
        place = start + segment.prefix
        prefix_key, prefix_value = key[:, :, start:place], value[:, :, start:place]
        if segment.prefix:
            outputs.append(
                _attend(query[:, :, start:place], prefix_key, prefix_value, 0, window, scale, masks)
            )
        for length in segment.lengths:
            own = slice(place, place + length)
            own_key, own_value = (
                torch.cat([head, tensor[:, :, own]], dim=2)
                for head, tensor in ((prefix_key, key), (prefix_value, value))
            )
            outputs.append(
                _attend(query[:, :, own], own_key, own_value, segment.prefix, window, scale, masks)
            )
            place = own.stop
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offset: int,
    window: int | None,
    scale: float,
    masks: Masks,
) -> Tensor:
    """Attention of a block, [1, heads, S, size].

    The query [1, heads, S, size] stands at positions offset.., key and value are [1, key heads,
    offset + S, size].
    """
    _, heads, length, size = query.shape
    groups = key.shape[1]
    share = heads // groups
    # Query heads that share a key head are folded into its rows, so keys are not copied.
    folded = query.reshape(1, groups, share * length, size)
    kind = length, offset, share, window or 0, query.dtype
    if kind not in masks:
        masks[kind] = _mask(*kind, query.device)
    result = functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=masks[kind], scale=scale
    )
    return result.reshape(1, heads, length, value.shape[-1])


def _mask(
    size: int, offset: int, share: int, window: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Additive mask [share * size, offset + size].

    0 where a query sees a key, minus infinity elsewhere.
    """
    own = torch.arange(offset, offset + size, device=device)[:, None]
    other = torch.arange(offset + size, device=device)[None, :]
    seen = own >= other
    if window:
        seen &= own - other < window
    return (
        torch.zeros(seen.shape, dtype=dtype, device=device)
        .masked_fill(~seen, float("-inf"))
        .repeat(share, 1)
    )


# Without a mask function of its own, transformers makes no mask and does not look at the positions:
# the layout alone decides who sees whom.
AttentionInterface.register(PACKED_ATTENTION, packed_attention)
