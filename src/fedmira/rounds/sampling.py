"""Which clients take part in a round."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedmira.config import RoundsSettings
from fedmira.messages import ClientId
from fedmira.seeds import seed_for

__all__ = ["cohort_size", "sample_clients"]


def cohort_size(num_clients: int, settings: RoundsSettings) -> int:
    """Clients per round: the share rounded half up ("keyed") or down ("shepherd"), at least one.

    Args:
        num_clients: those that can be drawn.
        settings: of [rounds].
    """
    share = num_clients * settings.participation
    return max(1, int(share) if settings.sampling == "shepherd" else math.floor(share + 0.5))


def sample_clients(
    clients: Sequence[ClientId], settings: RoundsSettings, run_seed: int, round_number: int
) -> list[ClientId]:
    """The sorted clients of a round, drawn without replacement, whatever happened before.

    Args:
        clients: ids of those that can be drawn.
        settings: of [rounds].
        run_seed: of the whole run.
        round_number: counts from 1. With sampling = "shepherd" numpy's legacy generator is seeded
            with the round index from 0, as in FedIT's public code (algorithm reference 2.1), so
            that every run has the same selection.
    """
    size = cohort_size(len(clients), settings)
    pool = sorted(clients)
    if settings.sampling == "shepherd":
        chosen = np.random.RandomState(round_number - 1).choice(
            np.arange(len(pool)), size, replace=False
        )
    else:
        chosen = np.random.default_rng(seed_for(run_seed, "sample", round_number)).choice(
            len(pool), size, replace=False
        )
    return sorted(pool[int(index)] for index in chosen)
