"""Packed steps: a batch as one row of tokens in which the shared prompt prefix stands once.

    [prefix][remainder 1][remainder 2]...

An example attends to the prefix and to itself, and to nothing else.

Under causal attention this is exactly the padded batch, and nothing is padded. A batch whose rows
share more among some of them than all of them do (several tasks in one client) becomes several
segments, cut so that the fewest tokens are computed. Segments of different clients follow each
other in one flat row, so linear layers see plain tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter

import torch
from torch import Tensor

from fedmira.model.base.rows import Row
from fedmira.model.base.transfer import sent

__all__ = ["PackedBatch", "Segment", "common_prefix", "gather", "joined", "pack", "segment_rows"]

_SEGMENT_COST = 16
"""What one more segment costs in attention calls, in tokens."""
_MOST_ROWS = 128
"""Rows of a segment.

Finding the best cut takes time with their square, and a prefix once for so many rows costs next to
nothing.
"""


@dataclass(frozen=True, slots=True)
class Segment:
    """Some rows of one client behind one shared prefix.

    Attributes:
        client: position of the client in the cohort.
        rows: the rows, and `indices` their positions in the client's batch.
        prefix: number of shared leading prompt tokens.
        lengths: tokens of each row behind the prefix; the last response token is predicted, never
            read.
        indices: positions of the rows in the client's batch.
    """

    client: int
    rows: tuple[Row, ...]
    indices: tuple[int, ...]
    prefix: int
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Token positions that a pass over the segment computes."""
        return self.prefix + sum(self.lengths)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Segments of one or more clients in one flat row of N tokens with M response tokens.

    Attributes:
        ids, positions: int64 [N].
        predict_at: int64 [M], the places whose next token is a response token.
        targets: int64 [M], those response tokens.
        clients, rows: int64 [M], the client and the row within its batch that each belongs to.
        starts: where each segment begins.
        segments: rows behind shared prefixes, in order.
    """

    segments: tuple[Segment, ...]
    starts: tuple[int, ...]
    ids: Tensor
    positions: Tensor
    predict_at: Tensor
    targets: Tensor
    clients: Tensor
    rows: Tensor

    @property
    def owners(self) -> list[tuple[int, slice]]:
        """Which of the N tokens belong to which client."""
        return joined((segment.client, segment.num_tokens) for segment in self.segments)

    @property
    def readers(self) -> list[tuple[int, slice]]:
        """Which of the M response tokens belong to which client."""
        return joined(
            (segment.client, sum(len(row.response) for row in segment.rows))
            for segment in self.segments
        )

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        tensors = (self.ids, self.positions, self.predict_at, self.targets, self.clients, self.rows)
        return PackedBatch(
            self.segments, self.starts, *(sent(tensor, device) for tensor in tensors)
        )


def joined(parts: Iterable[tuple[int, int]]) -> list[tuple[int, slice]]:
    """Slices of (client, size) parts that follow each other.

    One slice for neighbours of the same client.
    """
    found: list[tuple[int, slice]] = []
    start = 0
    for client, neighbours in groupby(parts, key=itemgetter(0)):
        stop = start + sum(size for _, size in neighbours)
        found.append((client, slice(start, stop)))
        start = stop
    return found


def common_prefix(rows: Sequence[Row]) -> int:
    """Number of leading prompt tokens that all rows share.

    Short of each row's last prompt token, which predicts.
    """
    prompts = [tuple(row.prompt) for row in rows]
    limit = min(map(len, prompts)) - 1
    least, last = (
        min(prompts),
        max(prompts),
    )  # what the first and the last in order share, all between them share
    return next((i for i in range(limit) if least[i] != last[i]), limit)


def segment_rows(
    client: int, rows: Sequence[Row], budget: int, share_prefix: bool = True
) -> list[Segment]:
    """Lay a client's batch out in segments that together compute the fewest tokens.

    A segment holds at most `budget` tokens.

    Rows in the order of their prompts lie beside those they share most with, so the best cut into
    runs of that order is found by dynamic programming: a run costs its shared prefix once and the
    rest of each row, and `_SEGMENT_COST`. One row always fits, however long.

    Args:
        client: index of the client in the cohort.
        rows: the batch.
        budget: most tokens in a forward pass.
        share_prefix: whether equal beginnings are computed once.
    """
    order = (
        sorted(range(len(rows)), key=lambda i: (tuple(rows[i].prompt), i))
        if share_prefix
        else list(range(len(rows)))
    )
    sizes = [len(rows[i].prompt) + len(rows[i].response) - 1 for i in order]
    shared = [common_prefix((rows[i], rows[j])) if share_prefix else 0 for i, j in pairwise(order)]
    best, cut = (
        [0],
        [0],
    )  # of the first rows of the order: the least cost, and where the last run begins
    for end in range(1, len(order) + 1):
        best.append(best[end - 1] + sizes[end - 1] + _SEGMENT_COST)
        cut.append(end - 1)
        total, prefix = sizes[end - 1], len(rows[order[end - 1]].prompt)
        for begin in range(end - 2, -1, -1):
            total, prefix = total + sizes[begin], min(prefix, shared[begin])
            tokens = total - (end - begin - 1) * prefix
            if tokens > budget or end - begin > _MOST_ROWS:
                break
            if best[begin] + tokens + _SEGMENT_COST <= best[end]:
                best[end], cut[end] = best[begin] + tokens + _SEGMENT_COST, begin
    segments = []
    end = len(order)
    while end:
        segments.append(_segment(client, rows, order[cut[end] : end], share_prefix))
        end = cut[end]
    return segments[::-1]


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
        for row, index, length in zip(segment.rows, segment.indices, segment.lengths, strict=True):
            first = len(ids) + len(row.prompt) - segment.prefix - 1
            predict_at += range(first, first + len(row.response))
            targets += row.response
            clients += [segment.client] * len(row.response)
            rows += [index] * len(row.response)
            ids += row.prompt[segment.prefix :]
            ids += row.response[:-1]
            positions += range(segment.prefix, segment.prefix + length)
    tensors = (
        torch.tensor(values, dtype=torch.long)
        for values in (ids, positions, predict_at, targets, clients, rows)
    )
    return PackedBatch(tuple(segments), tuple(starts), *tensors)


def gather(segments: Sequence[Segment], budget: int) -> Iterator[list[Segment]]:
    """Segments in the given order, as many at a time as fit `budget` tokens.

    Args:
        segments: rows behind shared prefixes, in order.
        budget: most tokens in a forward pass.
    """
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


def _segment(
    client: int, rows: Sequence[Row], chosen: Sequence[int], share_prefix: bool
) -> Segment:
    own = tuple(rows[i] for i in chosen)
    prefix = common_prefix(own) if share_prefix and len(own) > 1 else 0
    return Segment(
        client,
        own,
        tuple(chosen),
        prefix,
        tuple(len(row.prompt) - prefix + len(row.response) - 1 for row in own),
    )
