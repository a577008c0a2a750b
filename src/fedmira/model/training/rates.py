"""How the learning rate of local steps goes over a run, as shares of `local.learning_rate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from fedmira.config import LocalSettings

__all__ = ["SCHEDULES", "rate_shares"]

SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
"""local.schedule -> the share after so much of the run, 0 to below 1."""


def rate_shares(
    settings: LocalSettings, round_number: int, rounds: int, steps: int
) -> tuple[float, ...] | None:
    """The share of the learning rate of each local step of a round.

    Step i of n in round t of T comes after the share ((t - 1) + i / n) / T of the run, whoever took
    part in earlier rounds, so that all clients of a round have equal rates. Warm-up rises to 1 over
    the first steps of a client of every round: step s of the run, from 0, has min(1, (s + 1) / W).

    Args:
        settings: the [local] section.
        round_number: t, from 1.
        rounds: T.
        steps: n, of this client in a round.

    Returns:
        None where every share is 1.
    """
    if settings.schedule == "constant" and not settings.warmup_steps:
        return None
    share_at, before = SCHEDULES[settings.schedule], (round_number - 1) * steps
    shares = []
    for step in range(steps):
        done = (round_number - 1 + step / steps) / rounds
        warm = (before + step + 1) / settings.warmup_steps if settings.warmup_steps else 1.0
        shares.append(share_at(done) * min(1.0, warm))
    return tuple(shares)
