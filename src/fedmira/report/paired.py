"""Two methods on the same clients.

The paired difference of each client, who is better off beyond noise, and a bootstrap interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from fedmira.report.findings import CHANGE_LIMIT

__all__ = [
    "LEVEL",
    "NOISE_RULE",
    "RESAMPLES",
    "ClientDifference",
    "Losses",
    "Pairing",
    "bootstrap_interval",
    "errors_of_noise",
    "pair",
]

Losses = Mapping[int, Mapping[str, float]]
"""Seed -> client -> test loss."""

LEVEL = 0.95
RESAMPLES = 10_000
_DRAWS_AT_ONCE = 2_000_000  # counts held in memory


def errors_of_noise(seeds: int) -> float:
    """Standard errors over so many seeds that count as noise.

    The two-sided LEVEL quantile of Student's t; 0 with one seed.
    """
    return float(stdtrit(seeds - 1, (1 + LEVEL) / 2)) if seeds > 1 else 0.0


NOISE_RULE = (
    "A client is better (worse) off when its mean loss over the seeds is lower (higher) "
    f"by more than {100 * CHANGE_LIMIT:g} % and, "
    "with several seeds, by more than t standard errors of its difference over the seeds, "
    f"t being the two-sided {100 * LEVEL:g} % "
    "quantile of Student's t with one degree of freedom less than there are seeds ("
    + ", ".join(f"{errors_of_noise(seeds):.3g} with {seeds} seeds" for seeds in (2, 3, 5))
    + "); otherwise it is equal, which may also mean that there are too few seeds to tell."
)


@dataclass(frozen=True, slots=True)
class ClientDifference:
    """One client under two methods.

    Attributes:
        client: its id.
        own, other: mean test losses over the seeds.
        error: standard error of own - other over the seeds; 0 with one seed.
        seeds: how many there are.
    """

    client: str
    own: float
    other: float
    error: float
    seeds: int

    @property
    def difference(self) -> float:
        """Below 0 is a gain."""
        return self.own - self.other

    @property
    def relative(self) -> float:
        """The difference as a share of the other's loss."""
        return self.difference / self.other if self.other else 0.0

    @property
    def verdict(self) -> str:
        """The standing of the client by NOISE_RULE: "better", "equal" or "worse"."""
        noise = max(errors_of_noise(self.seeds) * self.error, CHANGE_LIMIT * self.other)
        return (
            "better"
            if self.difference < -noise
            else "worse"
            if self.difference > noise
            else "equal"
        )


@dataclass(frozen=True, slots=True)
class Pairing:
    """A method against a baseline, over the clients and seeds that both have.

    Attributes:
        clients: by client id.
        seeds: how many seeds both have.
        difference: mean over clients and seeds; below 0 is a gain.
        low, high: bounds of its bootstrap interval.
    """

    clients: Mapping[str, ClientDifference]
    seeds: int
    difference: float
    low: float
    high: float

    def count(self, verdict: str) -> int:
        """Clients with this verdict."""
        return sum(client.verdict == verdict for client in self.clients.values())

    @property
    def below(self) -> int:
        """Clients whose loss is lower by more than CHANGE_LIMIT, whatever their noise."""
        return sum(
            client.difference < -CHANGE_LIMIT * client.other for client in self.clients.values()
        )

    @property
    def above(self) -> int:
        """Clients whose loss is higher by more than CHANGE_LIMIT, whatever their noise."""
        return sum(
            client.difference > CHANGE_LIMIT * client.other for client in self.clients.values()
        )


def pair(own: Losses, other: Losses, pools: Mapping[str, str] | None = None) -> Pairing | None:
    """Pair two methods by seed and client.

    A client counts when both measured it with every common seed. None where nothing is common.

    Args:
        own: losses of the method.
        other: losses of the baseline.
        pools: client -> the pool that its rows were dealt from; None where each client has rows of
            its own.
    """
    seeds = sorted(set(own) & set(other))
    common = [set(own[seed]) & set(other[seed]) for seed in seeds]
    clients = sorted(set.intersection(*common)) if common else []
    if not clients:
        return None
    differences = np.array(
        [[own[seed][client] - other[seed][client] for seed in seeds] for client in clients]
    )
    found = {
        client: ClientDifference(
            client,
            fmean(own[seed][client] for seed in seeds),
            fmean(other[seed][client] for seed in seeds),
            stdev(row) / math.sqrt(len(seeds)) if len(seeds) > 1 else 0.0,
            len(seeds),
        )
        for client, row in zip(clients, differences.tolist(), strict=True)
    }
    of_client = None if pools is None else [pools[client] for client in clients]
    return Pairing(
        found, len(seeds), float(differences.mean()), *bootstrap_interval(differences, of_client)
    )


def bootstrap_interval(
    differences: NDArray[np.float64],
    pools: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float]:
    """The percentile interval of the mean over clients and seeds.

    Each resample draws clients with replacement and, independently, seeds with replacement, and
    averages over the rectangle of both. Clients of one pool resemble each other, so they are drawn
    together: as many pools as there are, with replacement, each with all its clients (the cluster
    bootstrap, Davison & Hinkley 1997, section 3.8). The draws are keyed, so equal differences give
    an equal interval.

    Args:
        differences: [clients, seeds], paired.
        pools: of each client; None where each is a pool of its own.
        resamples: how many means are drawn.
        level: share of them between the bounds.
    """
    seeds = differences.shape[1]
    sums, sizes = _by_pool(differences, pools)
    count = len(sizes)
    generator = np.random.default_rng(0)
    means = []
    at_once = max(1, _DRAWS_AT_ONCE // count)
    for first in range(0, resamples, at_once):
        size = min(at_once, resamples - first)
        times_pool = generator.multinomial(count, np.full(count, 1 / count), size=size)
        times_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=size)
        means.append(((times_pool @ sums) * times_seed).sum(axis=1) / (times_pool @ sizes * seeds))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _by_pool(
    differences: NDArray[np.float64], pools: Sequence[str] | None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sums [pools, seeds] over the clients of each pool, and how many those are."""
    if pools is None:
        return differences, np.ones(len(differences), dtype=np.int64)
    places = {pool: place for place, pool in enumerate(dict.fromkeys(pools))}
    place_of = np.array([places[pool] for pool in pools])
    sums = np.zeros((len(places), differences.shape[1]))
    np.add.at(sums, place_of, differences)
    return sums, np.bincount(place_of)
