"""Which prompts are continued together: groups that share a client and a prefix, gathered into rectangles that fit the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

from fedmira.model.packing import common_prefix

__all__ = ["CacheShape", "Extent", "Prompt", "PromptGroup", "Wave", "plan_waves"]

_MOST_ROWS = 64
_TOKEN_COST, _STEP_COST = 256, 8192
"""What a token's way through the layers and the fixed part of a step cost, in keys looked at; measured roughly, so only a guide."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to continue.

    Attributes:
        index: its place in the caller's list.
        prompt: its tokens but the last, which are read ahead; may be empty.
        response: its last token alone, from which the first step goes on (the names are those of a packed row).
        limit: most new tokens, at least 1.
    """

    index: int
    client: int
    prompt: Sequence[int]
    response: Sequence[int]
    limit: int


@dataclass(frozen=True, slots=True)
class Extent:
    """Sizes of a rectangle of prompts: groups x rows, columns for shared, own and new tokens; `cost` of a step, padding included."""

    groups: int
    rows: int
    prefix: int
    own: int
    limit: int

    def joined(self, other: Extent) -> Extent:
        """The rectangle that holds both."""
        largest = (max(getattr(self, name), getattr(other, name)) for name in ("rows", "prefix", "own", "limit"))
        return Extent(self.groups + other.groups, *largest)

    @property
    def cost(self) -> int:
        """What a step costs, in keys looked at. Shared keys cost a row less than its own, which nobody else looks at."""
        return _STEP_COST + self.groups * (self.rows * (_TOKEN_COST + self.own + self.limit + self.prefix // 4) + self.prefix)


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """Prompts of one client, longest first, whose first `prefix` tokens are the same."""

    client: int
    prompts: tuple[Prompt, ...]
    prefix: int

    @property
    def extent(self) -> Extent:
        """Its sizes."""
        own = len(self.prompts[0].prompt) - self.prefix
        return Extent(1, len(self.prompts), self.prefix, own, max(prompt.limit for prompt in self.prompts))


@dataclass(frozen=True, slots=True)
class Wave:
    """Groups that are continued side by side; where a group has fewer rows than the others, places stay empty."""

    groups: tuple[PromptGroup, ...]

    @property
    def extent(self) -> Extent:
        """The sizes that hold all of them."""
        return reduce(Extent.joined, (group.extent for group in self.groups))


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a wave holds in memory.

    Attributes:
        token_bytes: of the keys and values of one token in all layers.
        row_bytes: of the scores over the vocabulary of one row.
    """

    token_bytes: int
    row_bytes: int

    def of(self, extent: Extent) -> int:
        """Bytes of a rectangle's keys, values and scores."""
        places = extent.groups * extent.rows
        return (extent.groups * extent.prefix + places * (extent.own + extent.limit)) * self.token_bytes + places * self.row_bytes


def plan_waves(prompts: Sequence[Prompt], shape: CacheShape, most_bytes: int) -> list[Wave]:
    """All prompts in waves of at most `most_bytes`; a single prompt always fits.

    The prompts of a client are sorted by length and cut into groups of nearly equal size. Groups, ordered by size and length, are then
    cut into the waves whose steps together cost least.
    """
    clients: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        clients.setdefault(prompt.client, []).append(prompt)
    groups = [group for own in clients.values() for group in _groups(own, shape, most_bytes)]
    groups.sort(key=lambda group: (-group.extent.rows, -group.extent.own, -group.prefix, group.client))
    extents = [group.extent for group in groups]
    best: list[tuple[int, int]] = [(0, 0)]  # the least cost of the first i groups, and where their last wave begins
    for end in range(1, len(groups) + 1):
        wave = extents[end - 1]
        options = [(best[end - 1][0] + wave.cost, end - 1)]
        for start in range(end - 2, -1, -1):
            wave = wave.joined(extents[start])
            if shape.of(wave) > most_bytes:
                break
            options.append((best[start][0] + wave.cost, start))
        best.append(min(options))
    waves: list[Wave] = []
    end = len(groups)
    while end:
        start = best[end][1]
        waves.append(Wave(tuple(groups[start:end])))
        end = start
    return waves[::-1]


def _groups(prompts: Sequence[Prompt], shape: CacheShape, most_bytes: int) -> Iterator[PromptGroup]:
    order = sorted(prompts, key=lambda prompt: (-len(prompt.prompt), prompt.index))
    count = -(-len(order) // _MOST_ROWS)
    for number in range(count):
        part = order[number * len(order) // count : (number + 1) * len(order) // count]
        group = PromptGroup(part[0].client, tuple(part), max(0, common_prefix(part)))
        if len(part) > 1 and shape.of(group.extent) > most_bytes:
            half = (len(part) + 1) // 2
            yield from _groups(part[:half], shape, most_bytes)
            yield from _groups(part[half:], shape, most_bytes)
        else:
            yield group
