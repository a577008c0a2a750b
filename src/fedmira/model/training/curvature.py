"""What Sophia's estimate of the curvature needs.

Numbers to draw targets with, and a branch that drops nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from fedmira.model.base.rows import Row
from fedmira.model.lora.branches import Branch, Draws

__all__ = ["TargetDraws", "response_tokens", "without_dropout"]


class TargetDraws:
    """Uniform numbers for every response token of a client's batches, from its own stream.

    Args:
        seeds: of the clients of a cohort in this round; nobody's numbers depend on the others, nor
            on how batches are packed.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed ^ 0xD4A2) for seed in seeds]

    def of(self, batches: Mapping[int, Sequence[Row]]) -> Draws:
        """Fresh numbers for these clients' batches."""
        return {
            client: [
                torch.rand(
                    len(row.response), dtype=torch.float64, generator=self._generators[client]
                )
                for row in rows
            ]
            for client, rows in batches.items()
        }


def response_tokens(batches: Mapping[int, Sequence[Row]]) -> dict[int, int]:
    """Client -> response tokens of its batch."""
    return {client: sum(len(row.response) for row in rows) for client, rows in batches.items()}


@contextmanager
def without_dropout(branch: Branch) -> Iterator[None]:
    """Measure the curvature of the adapter itself, and leave the streams of dropout alone."""
    dropout, branch.dropout = branch.dropout, 0.0
    try:
        yield
    finally:
        branch.dropout = dropout
