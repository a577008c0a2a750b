"""Random streams of the data room, each keyed by what it is for.

So no draw depends on another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from fedmira.seeds import row_seed

__all__ = ["generator", "sample", "shuffled"]

Item = TypeVar("Item")


def generator(seed: int, purpose: str, *parts: str | int) -> np.random.Generator:
    """A generator that depends on nothing but its arguments.

    Args:
        seed: the seed of the run.
        purpose: what is drawn, such as "split"; other purposes give other numbers.
        parts: numbers and names that set one drawing apart from another.
    """
    return np.random.Generator(np.random.PCG64(row_seed(seed, purpose, *parts)))


def shuffled(items: Sequence[Item], rng: np.random.Generator) -> list[Item]:
    """The items in random order.

    Args:
        items: what to draw from; left as it is.
        rng: the generator to draw with.
    """
    return [items[int(i)] for i in rng.permutation(len(items))]


def sample(
    items: Sequence[Item], fraction: float, rng: np.random.Generator, least: int = 0
) -> list[Item]:
    """Items drawn without replacement, in their first order.

    max(least, int(fraction * n)) of the n items, which is FedKSeed's floor, or all where there are
    fewer.

    Args:
        items: what to draw from; left as it is.
        fraction: the share to keep, from 0 to 1.
        rng: the generator to draw with.
        least: the fewest items to keep.
    """
    if fraction == 1:
        return list(items)
    size = min(len(items), max(least, int(fraction * len(items))))
    kept = rng.choice(len(items), size=size, replace=False)
    return [items[int(i)] for i in np.sort(kept)]
