"""Which prompts are continued together.

Groups that share a client and a prefix, gathered into rectangles that fit the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

from fedmira.model.packed.packing import common_prefix

__all__ = ["Block", "CacheShape", "Extent", "Prompt", "PromptGroup", "Size", "Wave", "plan_waves"]

_MOST_ROWS = 64
_TOKEN_COST, _BLOCK_COST, _STEP_COST = 256, 1024, 8192
"""What a token's way through the layers, a block's attention and a step cost, in keys looked at.

Of a step it is the fixed part. Measured roughly, so only a guide.
"""

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to continue.

    Attributes:
        index: its place in the caller's list.
        prompt: its tokens but the last, which are read ahead; may be empty.
        response: its last token alone, from which the first step goes on (the names are those of a
            packed row).
        limit: most new tokens, at least 1.
        client: index of its client in the cohort.
    """

    index: int
    client: int
    prompt: Sequence[int]
    response: Sequence[int]
    limit: int


@dataclass(frozen=True, slots=True)
class Extent:
    """Sizes of a block: groups x rows, and columns for shared, own and new tokens.

    Attributes:
        groups: groups of prompts with a shared prefix.
        rows: rows of a group.
        prefix: tokens that all of a group share.
        own: tokens of a prompt behind the shared ones.
        limit: most new tokens.
    """

    groups: int
    rows: int
    prefix: int
    own: int
    limit: int

    def joined(self, other: Extent) -> Extent:
        """The rectangle that holds both."""
        largest = (
            max(getattr(self, name), getattr(other, name))
            for name in ("rows", "prefix", "own", "limit")
        )
        return Extent(self.groups + other.groups, *largest)

    @property
    def size(self) -> Size:
        """Of a wave with this block alone."""
        return Size(
            1, self.groups, self.rows, self.limit, self.groups * self.prefix, self.groups * self.own
        )


@dataclass(frozen=True, slots=True)
class Size:
    """The extent of a wave: its blocks, groups, rows and steps, and sums of columns.

    The sums are over all groups, of their shared columns and of those of a row's own.

    Attributes:
        blocks: how many blocks.
        groups: groups of prompts with a shared prefix.
        rows: rows of a group.
        limit: most new tokens.
        prefix: tokens that all of a group share.
        own: tokens of a prompt behind the shared ones.
    """

    blocks: int
    groups: int
    rows: int
    limit: int
    prefix: int
    own: int

    def beside(self, other: Size) -> Size:
        """Both in one wave."""
        sums = (getattr(self, name) + getattr(other, name) for name in ("prefix", "own"))
        return Size(
            self.blocks + other.blocks,
            self.groups + other.groups,
            max(self.rows, other.rows),
            max(self.limit, other.limit),
            *sums,
        )

    @property
    def cost(self) -> int:
        """What a step costs, in keys looked at.

        Shared keys cost a row less than its own, which nobody else looks at.
        """
        own = self.rows * (self.groups * (_TOKEN_COST + self.limit) + self.own + self.prefix // 4)
        return _STEP_COST + self.blocks * _BLOCK_COST + own + self.prefix


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """Prompts of one client, longest first, whose first `prefix` tokens are the same.

    Attributes:
        client: index of the client in the cohort.
        prompts: one at least.
        prefix: tokens that all of a group share.
    """

    client: int
    prompts: tuple[Prompt, ...]
    prefix: int

    @property
    def extent(self) -> Extent:
        """What the group takes as a block of its own."""
        own = len(self.prompts[0].prompt) - self.prefix
        return Extent(
            1, len(self.prompts), self.prefix, own, max(prompt.limit for prompt in self.prompts)
        )


@dataclass(frozen=True, slots=True)
class Block:
    """Groups of like length, whose keys and values stand in one rectangle.

    Where a group has fewer rows, places stay empty.
    """

    groups: tuple[PromptGroup, ...]

    @property
    def extent(self) -> Extent:
        """The sizes that hold all of them."""
        return reduce(Extent.joined, (group.extent for group in self.groups))


@dataclass(frozen=True, slots=True)
class Wave:
    """Blocks that are continued side by side.

    One step is for all, with as many rows in each group and as many steps as the largest needs.
    Only attention looks at each block by itself.
    """

    blocks: tuple[Block, ...]

    @property
    def groups(self) -> tuple[PromptGroup, ...]:
        """Those of all blocks, in order."""
        return tuple(group for block in self.blocks for group in block.groups)

    @property
    def size(self) -> Size:
        """The memory of all blocks beside each other."""
        return reduce(Size.beside, (block.extent.size for block in self.blocks))


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a wave holds in memory.

    Attributes:
        token_bytes: of the keys and values of one token in all layers.
        row_bytes: of the scores over the vocabulary of one row.
    """

    token_bytes: int
    row_bytes: int

    def of(self, size: Size) -> int:
        """Bytes of a wave's keys, values and scores."""
        own = size.rows * (size.own + size.groups * size.limit)
        return (size.prefix + own) * self.token_bytes + size.groups * size.rows * self.row_bytes


def plan_waves(prompts: Sequence[Prompt], shape: CacheShape, most_bytes: int) -> list[Wave]:
    """All prompts in waves of at most `most_bytes`; a single prompt always fits.

    The prompts of a client are sorted by length and cut into groups of nearly equal size. Groups,
    ordered by size and length, are then cut into blocks and these into waves, so that their steps
    together cost least.

    Args:
        prompts: of all clients, in any order.
        shape: what one token takes in the cache.
        most_bytes: most bytes of the cache of a wave.
    """
    clients: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        clients.setdefault(prompt.client, []).append(prompt)
    groups = [group for own in clients.values() for group in _groups(own, shape, most_bytes)]
    groups.sort(
        key=lambda group: (-group.extent.rows, -group.extent.own, -group.prefix, group.client)
    )
    extents = [group.extent for group in groups]
    in_blocks = _cut(
        extents,
        Extent.joined,
        lambda block: block.size.cost - _STEP_COST,
        lambda block: shape.of(block.size) <= most_bytes,
    )
    blocks = [Block(tuple(groups[part])) for part in in_blocks]
    in_waves = _cut(
        [block.extent.size for block in blocks],
        Size.beside,
        lambda wave: wave.cost,
        lambda wave: shape.of(wave) <= most_bytes,
    )
    return [Wave(tuple(blocks[part])) for part in in_waves]


def _cut(
    items: Sequence[Part],
    joined: Callable[[Part, Part], Part],
    cost: Callable[[Part], int],
    fits: Callable[[Part], bool],
) -> list[slice]:
    """Cuts a list so that its parts together cost least; every part but a single item fits.

    Args:
        joined: two neighbouring parts as one, which costs no less than each and fits where both do
            at most.
    """
    best: list[tuple[int, int]] = [
        (0, 0)
    ]  # the least cost of the first i items, and where their last part begins
    for end in range(1, len(items) + 1):
        part = items[end - 1]
        options = [(best[end - 1][0] + cost(part), end - 1)]
        for start in range(end - 2, -1, -1):
            part = joined(part, items[start])
            if not fits(part):
                break
            options.append((best[start][0] + cost(part), start))
        best.append(min(options))
    parts: list[slice] = []
    end = len(items)
    while end:
        start = best[end][1]
        parts.append(slice(start, end))
        end = start
    return parts[::-1]


def _groups(prompts: Sequence[Prompt], shape: CacheShape, most_bytes: int) -> Iterator[PromptGroup]:
    order = sorted(prompts, key=lambda prompt: (-len(prompt.prompt), prompt.index))
    count = -(-len(order) // _MOST_ROWS)
    for number in range(count):
        part = order[number * len(order) // count : (number + 1) * len(order) // count]
        group = PromptGroup(part[0].client, tuple(part), max(0, common_prefix(part)))
        if len(part) > 1 and shape.of(group.extent.size) > most_bytes:
            half = (len(part) + 1) // 2
            yield from _groups(part[:half], shape, most_bytes)
            yield from _groups(part[half:], shape, most_bytes)
        else:
            yield group
