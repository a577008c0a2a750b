"""Which of a client's rows make up each local step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fedmira.config import LocalSettings

__all__ = ["batch_indices", "count_steps"]


def batch_indices(num_rows: int, settings: LocalSettings, seed: int) -> Iterator[list[int]]:
    """The row numbers of each local step's batch.

    With `epochs`, every epoch is a new order cut into batches, the last one shorter. With `steps`
    or `steps_per_row`, orders follow one another without a cut. A batch is never larger than the
    client's rows.

    Args:
        num_rows: training rows of the client.
        settings: the [local] section.
        seed: of the run.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(settings.batch_size, num_rows)
    if settings.epochs:
        for _ in range(settings.epochs):
            order = torch.randperm(num_rows, generator=generator).tolist()
            yield from (order[start : start + size] for start in range(0, num_rows, size))
        return
    pool: list[int] = []
    for _ in range(count_steps(num_rows, settings)):
        while len(pool) < size:
            pool += torch.randperm(num_rows, generator=generator).tolist()
        yield pool[:size]
        pool = pool[size:]


def count_steps(num_rows: int, settings: LocalSettings) -> int:
    """Number of local steps a client with so many rows takes in a round.

    Args:
        num_rows: training rows of the client.
        settings: the [local] section.
    """
    if settings.steps_per_row:
        return max(1, round(settings.steps_per_row * num_rows))
    if not settings.epochs:
        return settings.steps
    size = min(settings.batch_size, num_rows)
    return settings.epochs * -(-num_rows // size)
