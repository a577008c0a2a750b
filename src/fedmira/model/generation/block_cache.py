"""The keys and values of one block of a wave, in place, and attention over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedmira.model.generation.waves import Block
from fedmira.model.packed.packing import Segment

__all__ = ["BlockCache"]


class BlockCache:
    """What G groups of R places have read.

    P shared columns for each group, L own and new columns for each place.

    Args:
        sizes: int64 [G, R], tokens that are read ahead in each place.
        limit: most steps.

    Attributes:
        block: groups and rows of the block.
        device: where the tensors are held.
    """

    def __init__(self, block: Block, sizes: Tensor, limit: int, device: torch.device) -> None:
        extent = block.extent
        self._groups, self._prefix, self._own_columns, self._limit = (
            block.groups,
            extent.prefix,
            extent.own,
            limit,
        )
        prefixes = torch.tensor([group.prefix for group in block.groups])[:, None, None]
        column = torch.arange(extent.prefix + extent.own + limit).expand(*sizes.shape, -1)
        behind = (
            column - extent.prefix - extent.own
        )  # counts from the token that the first step reads
        seen = torch.where(
            column < extent.prefix, column < prefixes, behind >= prefixes - sizes[..., None]
        )
        self._sizes = sizes.to(device)
        self._positions = torch.where(column < extent.prefix, column, sizes[..., None] + behind).to(
            device
        )
        self._mask = torch.zeros(column.shape).masked_fill(~seen, -math.inf).to(device)
        self._longest = int(sizes.max()) + limit
        self._windowed: dict[int, tuple[int, Tensor]] = {}
        self._written: set[int] = set()
        self.shared: dict[int, tuple[Tensor, ...]] = {}
        self.own: dict[int, tuple[Tensor, ...]] = {}

    def __len__(self) -> int:
        """The number of groups in the block."""
        return len(self._sizes)

    def keep(self, groups: Tensor, rows: Tensor) -> None:
        """Go on with some places only: `groups` [g] and for each of them `rows` [g, r].

        Args:
            groups: indices of the groups that go on, int64 [g].
            rows: for each of them the rows that go on, int64 [g, r].
        """
        at = (groups[:, None], rows)
        self._sizes, self._mask, self._positions = (
            tensor[at] for tensor in (self._sizes, self._mask, self._positions)
        )
        self._windowed.clear()
        for layer in self.own:
            keys, values = self.own[layer]
            self.own[layer] = _chosen(keys, at), _chosen(values, at)
            keys, values = self.shared[layer]
            self.shared[layer] = keys[groups], values[groups]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        steps: int,
        options: dict[str, Any],
    ) -> Tensor:
        """Attention of one layer after `steps` steps.

        Query [G, heads, R, size], key and value [G, key heads, R, size].

        Args:
            module: the attention layer that calls.
            query: [G, heads, R, size].
            key: [G, key heads, R, size].
            value: [G, key heads, R, size].
            steps: new tokens so far.
            options: what transformers hands to the layer's attention beside its tensors.

        Returns:
            [G, R, heads, size].
        """
        prefix, column = self._prefix, self._own_columns + steps
        (shared_keys, shared_values), whole = self._kept(module, key, value)
        own_keys, own_values = (tensor[:, :, :, : column + 1] for tensor in whole)
        own_keys[:, :, :, column] = key
        own_values[:, :, :, column] = value
        groups, heads, rows, size = query.shape
        key_heads = key.shape[1]
        share = heads // key_heads
        scaling = options.get("scaling")
        scaled = query * (size**-0.5 if scaling is None else scaling)
        # Query heads that share a key head, and for the prefix all rows of a group, are rows of one
        # product: no key is copied.
        scaled = (
            scaled.view(groups, key_heads, share, rows, size)
            .transpose(2, 3)
            .reshape(groups, key_heads, rows * share, size)
        )
        to_own = torch.matmul(
            scaled.view(groups, key_heads, rows, share, size), own_keys.transpose(-1, -2)
        )
        to_shared = torch.matmul(scaled, shared_keys.transpose(-1, -2)).view(
            groups, key_heads, rows, share, prefix
        )
        scores = torch.cat([to_shared, to_own], dim=-1)
        window = options.get("sliding_window") or 0
        mask = self._seen(window if window < self._longest else 0, steps)[:, None, :, None]
        weights = torch.softmax(scores.float().add_(mask), dim=-1).to(value.dtype)
        to_prefix = weights.view(groups, key_heads, rows * share, -1)[..., :prefix]
        result = torch.matmul(weights[..., prefix:], own_values)
        result += torch.matmul(to_prefix, shared_values).view(result.shape)
        return result.permute(0, 2, 1, 3, 4).flatten(2, 3)

    def destinations(self, segments: Sequence[tuple[int, Segment, int]]) -> tuple[Tensor, ...]:
        """Where the tokens of packed segments belong.

        (place, group, column) of shared and (place, group, row, column) of own tokens.

        Args:
            segments: the group of each, the segment, and where it begins in the packed row.
        """
        shared: list[tuple[Tensor, ...]] = []
        own: list[tuple[Tensor, ...]] = []
        for number, segment, start in segments:
            prefix, place = self._groups[number].prefix, start + segment.prefix
            for row, index, length in zip(
                segment.rows, segment.indices, segment.lengths, strict=True
            ):
                tokens = torch.cat(
                    [
                        torch.arange(start, start + segment.prefix),
                        torch.arange(place, place + length),
                    ]
                )
                place += length
                if number not in self._written:
                    self._written.add(number)
                    shared.append(
                        (tokens[:prefix], torch.full((prefix,), number), torch.arange(prefix))
                    )
                count = len(row.prompt) - prefix
                columns = torch.arange(self._own_columns - count, self._own_columns)
                own.append(
                    (
                        tokens[prefix:],
                        torch.full((count,), number),
                        torch.full((count,), index),
                        columns,
                    )
                )
        return *_joined(shared, 3), *_joined(own, 4)

    def store(
        self, module: nn.Module, key: Tensor, value: Tensor, destinations: tuple[Tensor, ...]
    ) -> None:
        """Put keys and values [1, key heads, N, size] of a packed pass in their places.

        Args:
            module: the attention layer that calls.
            key: [1, key heads, N, size].
            value: [1, key heads, N, size].
            destinations: places in the cache.
        """
        shared_from, shared_group, shared_column, own_from, own_group, own_row, own_column = (
            destinations
        )
        for new, shared, own in zip((key, value), *self._kept(module, key, value), strict=True):
            by_token = new[0].transpose(0, 1)
            shared[shared_group, :, shared_column] = by_token[shared_from]
            own[own_group, :, own_row, own_column] = by_token[own_from]

    def _kept(
        self, module: nn.Module, key: Tensor, value: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A layer's shared keys and values, and the rows' own.

        [G, key heads, P, size] and [G, key heads, R, L, size].
        """
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layer not in self.own:
            groups, rows = self._sizes.shape
            columns = self._own_columns + self._limit
            self.shared[layer] = tuple(
                new.new_zeros(groups, new.shape[1], self._prefix, new.shape[-1])
                for new in (key, value)
            )
            self.own[layer] = tuple(
                new.new_zeros(groups, new.shape[1], rows, columns, new.shape[-1])
                for new in (key, value)
            )
        return self.shared[layer], self.own[layer]

    def _seen(self, window: int, steps: int) -> Tensor:
        """Additive mask [G, R, columns so far] of this step."""
        made, mask = self._windowed.get(window, (-1, self._mask))
        if made != steps:
            width = self._prefix + self._own_columns + steps + 1
            mask = self._mask[..., :width]
            if window:
                distance = (self._sizes + steps)[..., None] - self._positions[..., :width]
                mask = mask.masked_fill(distance >= window, -math.inf)
            self._windowed[window] = steps, mask
        return mask


def _joined(parts: Sequence[tuple[Tensor, ...]], columns: int) -> tuple[Tensor, ...]:
    """One tensor for each column of the parts."""
    return (
        tuple(map(torch.cat, zip(*parts, strict=True)))
        if parts
        else (torch.empty(0, dtype=torch.long),) * columns
    )


def _chosen(tensor: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
    """Some groups and rows of [G, heads, R, columns, size], in memory of its own."""
    return tensor.transpose(1, 2)[at].transpose(1, 2).contiguous()
