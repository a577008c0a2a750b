"""Greedy decoding of a wave, against keys and values that stay in place.

Prompts are read packed, then one token of every row at a time.

A group's shared prefix stands once in the cache. Its rows' own tokens are aligned on the right, so
that every new token of a block's rows goes into the same column and masks change only where a
window slides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fedmira.model.base.types import BaseModel
from fedmira.model.generation.block_cache import BlockCache
from fedmira.model.generation.waves import Wave
from fedmira.model.lora.branch import LoraBranch
from fedmira.model.packed.attention import (
    Layout,
    packed_attention,
    packed_layout,
    refuse_what_is_not_told,
)
from fedmira.model.packed.packing import (
    PackedBatch,
    gather,
    joined,
    pack,
    segment_rows,
)

__all__ = ["CACHED_ATTENTION", "WaveDecoder", "cached_attention", "rectangle"]

CACHED_ATTENTION = "fedmira_cached"
_decoder: ContextVar[WaveDecoder | None] = ContextVar("wave decoder", default=None)


class _AllStored(Exception):
    """The last layer's keys are in the cache: the rest of a reading pass is of no use."""


class WaveDecoder:
    """Continues the prompts of a wave: G groups of R places each, block after block.

    Attributes:
        clients: the client of each group.
        places: int64 [G, R], group * R + row in the wave as it was planned; a place beyond its
            group's prompts is empty.
        base: the frozen base.
        wave: the prompts that are answered side by side.
    """

    def __init__(self, base: BaseModel, wave: Wave) -> None:
        self._base, self._wave = base, wave
        self.clients = [group.client for group in wave.groups]
        groups, rows, limit = len(wave.groups), wave.size.rows, wave.size.limit
        self.places = torch.arange(groups * rows, device=base.device).view(groups, rows)
        sizes = rectangle(
            wave,
            [[len(prompt.prompt) for prompt in group.prompts] for group in wave.groups],
            torch.device("cpu"),
        )
        sizes = sizes.maximum(
            torch.tensor([group.prefix for group in wave.groups])[:, None]
        )  # empty places see their group's prefix
        parts = torch.split(sizes, [len(block.groups) for block in wave.blocks])
        self._blocks = [
            BlockCache(block, part, limit, base.device)
            for block, part in zip(wave.blocks, parts, strict=True)
        ]
        self._sizes = sizes.to(base.device)
        self._last_layer = base.model.config.get_text_config().num_hidden_layers - 1
        self._steps = 0
        self._sources: list[tuple[BlockCache, tuple[Tensor, ...]]] = []

    @property
    def reading(self) -> bool:
        """Whether a packed pass over prompts is under way."""
        return bool(self._sources)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block the model's attention reads and writes this cache.

        Its own attention is put back afterwards.
        """
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
        """Read all prompts but their last tokens, at most `budget` tokens in a pass.

        To be called before the first step.

        Only keys and values are kept, so each pass ends in the last layer's attention.

        Args:
            branch: the adapters of the clients, as they are hooked into the layers.
            budget: most tokens in a forward pass.
        """
        segments = []
        for number, group in enumerate(self._wave.groups):
            prompts = [
                prompt for prompt in group.prompts if prompt.prompt
            ]  # longest first, so their numbers stay
            segments += segment_rows(number, prompts, budget) if prompts else []
        for chosen in gather(segments, budget):
            batch = pack(chosen)
            self._sources = self._destinations(batch)
            batch = batch.to(self._base.device)
            owners = joined(
                (self.clients[segment.client], segment.num_tokens) for segment in batch.segments
            )
            with (
                packed_layout(self._base.model, Layout(batch, attention=self._base.attention)),
                self.attached(),
                branch.tokens(owners),
                suppress(_AllStored),
            ):
                self._forward(batch.ids[None], batch.positions[None])
        self._sources = []

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token in every place, int64 [G, R]; the hidden states [G, R, hidden].

        To be called within `attached` and within `branch.rows(decoder.clients)`, at most as often
        as the wave's limit says.
        """
        positions = self._sizes + self._steps
        if self._base.max_positions is not None:
            positions = positions.clamp(
                max=self._base.max_positions - 1
            )  # finished rows run on beside the others
        hidden = self._forward(tokens, positions)
        self._steps += 1
        return hidden

    def keep(self, groups: Tensor, rows: Tensor) -> None:
        """Go on with some places only.

        `groups` [g], ascending, and for each of them `rows` [g, r].

        Args:
            groups: indices of the groups that go on, int64 [g].
            rows: for each of them the rows that go on, int64 [g, r].
        """
        at = (groups[:, None], rows)
        self.clients = [self.clients[group] for group in groups.tolist()]
        self.places, self._sizes = self.places[at], self._sizes[at]
        first, blocks = 0, []
        for block in self._blocks:
            mine = (groups >= first) & (groups < first + len(block))
            first += len(block)
            if mine.any():
                block.keep(groups[mine] - (first - len(block)), rows[mine])
                blocks.append(block)
        self._blocks = blocks

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """Attention of one layer, [G, R, heads, size].

        The query is [G, heads, R, size], key and value are [G, key heads, R, size].

        Args:
            module: the attention layer that calls.
            query: [G, heads, R, size].
            key: [G, key heads, R, size].
            value: [G, key heads, R, size].
            options: what transformers hands to the layer's attention beside its tensors.
        """
        counts = [len(block) for block in self._blocks]
        parts = zip(
            self._blocks,
            *(torch.split(tensor, counts) for tensor in (query, key, value)),
            strict=True,
        )
        found = [
            block.attend(module, *part, steps=self._steps, options=options)
            for block, *part in parts
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def store(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Put the keys and values [1, key heads, N, size] of a packed pass in their places.

        Args:
            module: the attention layer that calls.
            key: [1, key heads, N, size].
            value: [1, key heads, N, size].
        """
        assert self._sources, "keys are stored while prompts are read"
        for block, sources in self._sources:
            block.store(module, key, value, sources)
        if module.layer_idx == self._last_layer:
            raise _AllStored

    def _destinations(self, batch: PackedBatch) -> list[tuple[BlockCache, tuple[Tensor, ...]]]:
        """Where the tokens of a pass belong in each block that it touches."""
        found = []
        first = 0
        for block in self._blocks:
            parts = [
                (s, start)
                for s, start in zip(batch.segments, batch.starts, strict=True)
                if first <= s.client < first + len(block)
            ]
            if parts:
                own = block.destinations([(s.client - first, s, start) for s, start in parts])
                found.append((block, tuple(tensor.to(self._base.device) for tensor in own)))
            first += len(block)
        return found

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        hidden = self._base.model.base_model(
            input_ids=ids, position_ids=positions, use_cache=False
        ).last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' AttentionInterface.

    Packed while a wave's prompts are read, against its cache afterwards.

    Args:
        module: the attention layer that calls.
        query: [batch, heads, tokens, size].
        key: [batch, key heads, tokens, size].
        value: [batch, key heads, tokens, size].
        attention_mask: not read; the layout says who sees whom.
        options: what transformers hands to the layer's attention beside its tensors.

    Raises:
        NotImplementedError: see `refuse_what_is_not_told`.

    Returns:
        [batch, tokens, heads, size], and None for the weights.
    """
    decoder = _decoder.get()
    assert decoder is not None, "cached attention is only used inside WaveDecoder.attached"
    refuse_what_is_not_told(module, options)
    if decoder.reading:
        decoder.store(module, key, value)
        return packed_attention(module, query, key, value, attention_mask, **options)
    return decoder.attend(module, query, key, value, options), None


def rectangle(wave: Wave, values: list[list[int]], device: torch.device) -> Tensor:
    """A number of each prompt in its place, int64 [G, R]; 0 in empty places.

    Args:
        wave: the prompts that are answered side by side.
        values: for each group a number of each of its prompts.
        device: where the tensor is made.
    """
    rows = wave.size.rows
    return torch.tensor([row + [0] * (rows - len(row)) for row in values], device=device)


# Without a mask function of its own, transformers makes no mask: the cache alone decides who sees
# whom.
AttentionInterface.register(CACHED_ATTENTION, cached_attention)
