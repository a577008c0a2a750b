"""Greedy decoding of a wave: prompts read packed, then one token of every row at a time against keys and values that stay in place.

A group's shared prefix stands once in the cache. Its rows' own tokens are aligned on the right, so that every new token of every row
goes into the same column and masks change only where a window slides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fedmira.model.attention import packed_attention, packed_layout
from fedmira.model.base_model import BaseModel
from fedmira.model.lora import LoraBranch
from fedmira.model.packing import PackedBatch, gather, pack, segment_rows
from fedmira.model.waves import Wave

__all__ = ["CACHED_ATTENTION", "WaveDecoder", "cached_attention", "rectangle"]

CACHED_ATTENTION = "fedmira_cached"
_decoder: ContextVar[WaveDecoder | None] = ContextVar("wave decoder", default=None)


class _AllStored(Exception):
    """The last layer's keys are in the cache: the rest of a reading pass is of no use."""


class WaveDecoder:
    """The keys, values and positions of G groups of R places each, P shared columns and L own columns.

    Attributes:
        clients: the client of each group.
        places: int64 [G, R], group * R + row in the wave as it was planned; a place beyond its group's prompts is empty.
    """

    def __init__(self, base: BaseModel, wave: Wave) -> None:
        self._base, self._wave, self._extent = base, wave, wave.extent
        self.clients = [group.client for group in wave.groups]
        groups, rows, prefix = len(wave.groups), self._extent.rows, self._extent.prefix
        sizes = rectangle(wave, [[len(prompt.prompt) for prompt in group.prompts] for group in wave.groups], torch.device("cpu"))
        prefixes = torch.tensor([group.prefix for group in wave.groups])[:, None, None]
        sizes = sizes.maximum(prefixes[..., 0])  # empty places see their group's prefix
        column = torch.arange(prefix + self._extent.own + self._extent.limit).expand(groups, rows, -1)
        behind = column - prefix - self._extent.own  # counts from the token that the first step reads
        seen = torch.where(column < prefix, column < prefixes, behind >= prefixes - sizes[..., None])
        self.places = torch.arange(groups * rows, device=base.device).view(groups, rows)
        self._sizes = sizes.to(base.device)
        self._positions = torch.where(column < prefix, column, sizes[..., None] + behind).to(base.device)
        self._mask = torch.zeros(column.shape).masked_fill(~seen, -math.inf).to(base.device)
        self._longest = int(sizes.max()) + self._extent.limit
        self._last_layer = base.model.config.get_text_config().num_hidden_layers - 1
        self._steps = 0
        self._windowed: dict[int, Tensor] = {}
        self._shared: dict[int, tuple[Tensor, ...]] = {}
        self._own: dict[int, tuple[Tensor, ...]] = {}
        self._sources: tuple[Tensor, ...] | None = None

    @property
    def reading(self) -> bool:
        """Whether a packed pass over prompts is under way."""
        return self._sources is not None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block the model's attention reads and writes this cache; its own attention is put back afterwards."""
        model = self._base.model
        usual = model.config._attn_implementation
        token = _decoder.set(self)
        model.set_attn_implementation(CACHED_ATTENTION)
        try:
            yield
        finally:
            model.set_attn_implementation(usual)
            _decoder.reset(token)

    def read(self, branch: LoraBranch, budget: int) -> None:
        """Read all prompts but their last tokens, at most `budget` tokens in a pass; to be called before the first step.

        Only keys and values are kept, so each pass ends in the last layer's attention.
        """
        segments = []
        for number, group in enumerate(self._wave.groups):
            prompts = [prompt for prompt in group.prompts if prompt.prompt]  # longest first, so their numbers stay
            segments += segment_rows(number, prompts, budget) if prompts else []
        written: set[int] = set()
        for chosen in gather(segments, budget):
            batch = pack(chosen)
            self._sources = tuple(tensor.to(self._base.device) for tensor in self._destinations(batch, written))
            batch = batch.to(self._base.device)
            ends = [*batch.starts[1:], len(batch.ids)]
            owners = [(self.clients[s.client], slice(start, end)) for s, start, end in zip(batch.segments, batch.starts, ends, strict=True)]
            with (
                packed_layout(self._base.model, batch, kernels=self._base.kernels),
                self.attached(),
                branch.tokens(owners),
                suppress(_AllStored),
            ):
                self._forward(batch.ids[None], batch.positions[None])
        self._sources = None

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token in every place, int64 [G, R]; the hidden states [G, R, hidden].

        To be called within `attached` and within `branch.rows(decoder.clients)`, at most as often as the wave's limit says.
        """
        positions = self._sizes + self._steps
        if self._base.max_positions is not None:
            positions = positions.clamp(max=self._base.max_positions - 1)  # finished rows run on beside the others
        self._windowed.clear()
        hidden = self._forward(tokens, positions)
        self._steps += 1
        return hidden

    def keep(self, groups: Tensor, rows: Tensor) -> None:
        """Go on with some places only: `groups` [g] and for each of them `rows` [g, r]."""
        at = (groups[:, None], rows)
        self.clients = [self.clients[group] for group in groups.tolist()]
        self.places, self._sizes, self._mask, self._positions = (
            tensor[at] for tensor in (self.places, self._sizes, self._mask, self._positions)
        )
        for layer in self._own:
            keys, values = self._own[layer]
            self._own[layer] = _chosen(keys, at), _chosen(values, at)
            keys, values = self._shared[layer]
            self._shared[layer] = keys[groups], values[groups]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        """Attention of one layer; query [G, heads, R, size], key and value [G, key heads, R, size] -> [G, R, heads, size]."""
        prefix, column = self._extent.prefix, self._extent.own + self._steps
        (shared_keys, shared_values), whole = self._kept(module, key, value)
        own_keys, own_values = (tensor[:, :, :, : column + 1] for tensor in whole)
        own_keys[:, :, :, column] = key
        own_values[:, :, :, column] = value
        groups, heads, rows, size = query.shape
        key_heads = key.shape[1]
        share = heads // key_heads
        scaling = options.get("scaling")
        scaled = query * (size**-0.5 if scaling is None else scaling)
        # Query heads that share a key head, and for the prefix all rows of a group, are rows of one product: no key is copied.
        scaled = scaled.view(groups, key_heads, share, rows, size).transpose(2, 3).reshape(groups, key_heads, rows * share, size)
        to_own = torch.matmul(scaled.view(groups, key_heads, rows, share, size), own_keys.transpose(-1, -2))
        to_shared = torch.matmul(scaled, shared_keys.transpose(-1, -2)).view(groups, key_heads, rows, share, prefix)
        scores = torch.cat([to_shared, to_own], dim=-1)
        window = options.get("sliding_window") or 0
        mask = self._seen(window if window < self._longest else 0)[:, None, :, None]
        weights = torch.softmax(scores.float().add_(mask), dim=-1).to(value.dtype)
        to_prefix = weights.view(groups, key_heads, rows * share, -1)[..., :prefix]
        result = torch.matmul(weights[..., prefix:], own_values)
        result += torch.matmul(to_prefix, shared_values).view(result.shape)
        return result.permute(0, 2, 1, 3, 4).flatten(2, 3)

    def store(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Put the keys and values [1, key heads, N, size] of a packed pass in their places."""
        assert self._sources is not None, "keys are stored while prompts are read"
        shared_from, shared_group, shared_column, own_from, own_group, own_row, own_column = self._sources
        for new, shared, own in zip((key, value), *self._kept(module, key, value), strict=True):
            by_token = new[0].transpose(0, 1)
            shared[shared_group, :, shared_column] = by_token[shared_from]
            own[own_group, :, own_row, own_column] = by_token[own_from]
        if module.layer_idx == self._last_layer:
            raise _AllStored

    def _kept(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A layer's shared keys and values [G, key heads, P, size], and the rows' own [G, key heads, R, L, size]."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layer not in self._own:
            groups, rows = self.places.shape
            columns = self._extent.own + self._extent.limit
            self._shared[layer] = tuple(new.new_zeros(groups, new.shape[1], self._extent.prefix, new.shape[-1]) for new in (key, value))
            self._own[layer] = tuple(new.new_zeros(groups, new.shape[1], rows, columns, new.shape[-1]) for new in (key, value))
        return self._shared[layer], self._own[layer]

    def _destinations(self, batch: PackedBatch, written: set[int]) -> tuple[Tensor, ...]:
        """Where the tokens of a pass belong: (place, group, column) of shared and (place, group, row, column) of own tokens."""
        shared: list[tuple[int, int, int]] = []
        own: list[tuple[int, int, int, int]] = []
        for segment, start in zip(batch.segments, batch.starts, strict=True):
            number, prefix = segment.client, self._wave.groups[segment.client].prefix
            place = start + segment.prefix
            for row, index, length in zip(segment.rows, segment.indices, segment.lengths, strict=True):
                tokens = [*range(start, start + segment.prefix), *range(place, place + length)]
                place += length
                if number not in written:
                    written.add(number)
                    shared += [(token, number, column) for column, token in enumerate(tokens[:prefix])]
                first = self._extent.own - (len(row.prompt) - prefix)
                own += [(token, number, index, first + i) for i, token in enumerate(tokens[prefix:])]
        return (*torch.tensor(shared, dtype=torch.long).view(-1, 3).unbind(1), *torch.tensor(own).unbind(1))

    def _seen(self, window: int) -> Tensor:
        """Additive mask [G, R, columns so far] of this step."""
        if window not in self._windowed:
            width = self._extent.prefix + self._extent.own + self._steps + 1
            mask = self._mask[..., :width]
            if window:
                distance = (self._sizes + self._steps)[..., None] - self._positions[..., :width]
                mask = mask.masked_fill(distance >= window, -math.inf)
            self._windowed[window] = mask
        return self._windowed[window]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        hidden = self._base.model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden


def cached_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention for transformers' AttentionInterface: packed while a wave's prompts are read, against its cache afterwards.

    Raises:
        NotImplementedError: the architecture caps its scores or has attention sinks.

    Returns:
        [batch, tokens, heads, size], and None for the weights.
    """
    decoder = _decoder.get()
    assert decoder is not None, "cached attention is only used inside WaveDecoder.attached"
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise NotImplementedError("soft-capped scores and attention sinks are not cached")
    if decoder.reading:
        decoder.store(module, key, value)
        return packed_attention(module, query, key, value, attention_mask, **options)
    return decoder.attend(module, query, key, value, options), None


def rectangle(wave: Wave, values: list[list[int]], device: torch.device) -> Tensor:
    """A number of each prompt in its place, int64 [G, R]; 0 in empty places."""
    rows = wave.extent.rows
    return torch.tensor([row + [0] * (rows - len(row)) for row in values], device=device)


def _chosen(tensor: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
    """Some groups and rows of [G, heads, R, columns, size], in memory of its own."""
    return tensor.transpose(1, 2)[at].transpose(1, 2).contiguous()


# Without a mask function of its own, transformers makes no mask: the cache alone decides who sees whom.
AttentionInterface.register(CACHED_ATTENTION, cached_attention)
