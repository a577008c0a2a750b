"""Packed steps: a client's batch laid out as one row of tokens in which the shared prompt prefix stands once.

    [prefix][remainder 1][remainder 2]...        an example attends to the prefix and to itself, nothing else

Under causal attention this is exactly the padded batch. Remainders of similar length form a group, padded on the right to one
size; right padding needs no mask because no real token looks ahead. Segments of different clients follow each other in one
flat row, so linear layers see plain tokens and nothing is padded to another client's shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Group", "PackedBatch", "Row", "Segment", "common_prefix", "gather", "pack", "segment_rows"]


class Row(Protocol):
    """Token ids of a prompt and of its response (with the end-of-sequence token); neither is empty."""

    @property
    def prompt(self) -> Sequence[int]:
        """Tokens that are read."""
        ...

    @property
    def response(self) -> Sequence[int]:
        """Tokens that carry loss."""
        ...


@dataclass(frozen=True, slots=True)
class Group:
    """Remainders of similar length: `rows` index the segment's rows, each padded to `size` tokens."""

    rows: tuple[int, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Some rows of one client behind one shared prefix.

    Attributes:
        client: position of the client in the cohort.
        rows: the rows, and `indices` their positions in the client's batch.
        prefix: number of shared leading prompt tokens.
        groups: how the remainders are laid out.
    """

    client: int
    rows: tuple[Row, ...]
    indices: tuple[int, ...]
    prefix: int
    groups: tuple[Group, ...]

    @property
    def num_tokens(self) -> int:
        """Token positions computed, padding included."""
        return self.prefix + sum(len(group.rows) * group.size for group in self.groups)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Segments of one or more clients in one flat row of N tokens with M response tokens.

    Attributes:
        ids, positions: int64 [N].
        predict_at: int64 [M], the places whose next token is a response token.
        targets: int64 [M], those response tokens.
        clients, rows: int64 [M], the client and the row within its batch that each belongs to.
        starts: where each segment begins.
    """

    segments: tuple[Segment, ...]
    starts: tuple[int, ...]
    ids: Tensor
    positions: Tensor
    predict_at: Tensor
    targets: Tensor
    clients: Tensor
    rows: Tensor

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        tensors = (self.ids, self.positions, self.predict_at, self.targets, self.clients, self.rows)
        return PackedBatch(self.segments, self.starts, *(tensor.to(device) for tensor in tensors))


def common_prefix(rows: Sequence[Row]) -> int:
    """Number of leading prompt tokens that all rows share, short of each row's last prompt token, which predicts."""
    limit = min(len(row.prompt) for row in rows) - 1
    first = rows[0].prompt
    last = max(rows, key=lambda row: tuple(row.prompt[:limit])).prompt
    least = min(rows, key=lambda row: tuple(row.prompt[:limit])).prompt
    shared = 0
    while shared < limit and first[shared] == last[shared] == least[shared]:
        shared += 1
    return shared


def segment_rows(client: int, rows: Sequence[Row], budget: int, share_prefix: bool = True) -> list[Segment]:
    """Lay a client's batch out in few segments of at most `budget` tokens each; one row always fits, however long."""
    whole = _segment(client, rows, range(len(rows)), share_prefix)
    if whole.num_tokens <= budget or len(rows) == 1:
        return [whole]
    half = (len(rows) + 1) // 2
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].prompt) + len(rows[i].response), i))
    return [part for chosen in (order[:half], order[half:]) for part in _split(client, rows, chosen, budget, share_prefix)]


def pack(segments: Sequence[Segment]) -> PackedBatch:
    """Put segments one after another and note where responses are predicted."""
    ids: list[int] = []
    positions: list[int] = []
    predict_at: list[int] = []
    targets: list[int] = []
    clients: list[int] = []
    rows: list[int] = []
    starts: list[int] = []
    for segment in segments:
        starts.append(len(ids))
        ids += segment.rows[0].prompt[: segment.prefix]
        positions += range(segment.prefix)
        for group in segment.groups:
            for index in group.rows:
                row = segment.rows[index]
                remainder = [*row.prompt[segment.prefix :], *row.response[:-1]]  # the last response token is predicted, never read
                first = len(ids) + len(row.prompt) - segment.prefix - 1
                predict_at += range(first, first + len(row.response))
                targets += row.response
                clients += [segment.client] * len(row.response)
                rows += [segment.indices[index]] * len(row.response)
                ids += remainder + [remainder[-1]] * (group.size - len(remainder))
                positions += range(segment.prefix, segment.prefix + group.size)
    tensors = (torch.tensor(values, dtype=torch.long) for values in (ids, positions, predict_at, targets, clients, rows))
    return PackedBatch(tuple(segments), tuple(starts), *tensors)


def gather(segments: Sequence[Segment], budget: int) -> Iterator[list[Segment]]:
    """Segments in the given order, as many at a time as fit `budget` tokens."""
    batch: list[Segment] = []
    tokens = 0
    for segment in segments:
        if batch and tokens + segment.num_tokens > budget:
            yield batch
            batch, tokens = [], 0
        batch.append(segment)
        tokens += segment.num_tokens
    if batch:
        yield batch


def _split(client: int, rows: Sequence[Row], chosen: Sequence[int], budget: int, share_prefix: bool) -> list[Segment]:
    part = _segment(client, rows, chosen, share_prefix)
    if part.num_tokens <= budget or len(chosen) == 1:
        return [part]
    half = (len(chosen) + 1) // 2
    return [part for side in (chosen[:half], chosen[half:]) for part in _split(client, rows, side, budget, share_prefix)]


def _segment(client: int, rows: Sequence[Row], chosen: Sequence[int], share_prefix: bool) -> Segment:
    own = tuple(rows[i] for i in chosen)
    prefix = common_prefix(own) if share_prefix and len(own) > 1 else 0
    return Segment(client, own, tuple(chosen), prefix, tuple(_groups([len(row.prompt) - prefix + len(row.response) - 1 for row in own])))


def _groups(lengths: Sequence[int]) -> Iterator[Group]:
    """Longest first; a row joins a group while its padding stays small against the cost of one more attention call."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    members: list[int] = []
    for index in order:
        if members and lengths[members[0]] - lengths[index] > 8 + lengths[members[0]] // 8:
            yield Group(tuple(members), lengths[members[0]])
            members = []
        members.append(index)
    yield Group(tuple(members), lengths[members[0]])
