"""What a newcomer may start from: nothing, what all have in common, one adapter, or a mix.

Adapters are scored by their losses on the newcomer's rows. A mix is a sum of updates as products,

    sum_k w_k tau_k,      w_k in proportion to exp(-d_k / e_k)

over the few adapters with the lowest losses, with d_k the loss per token above the best one's and
e_k the standard error of d_k between rows: an adapter that is one standard error behind weighs
1 / e of the best, so that few rows, which tell little, mix evenly, and many rows choose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmira.adapters import Adapter, mix
from fedmira.metrics import mean_and_error

__all__ = [
    "FEW",
    "FRESH",
    "GENERALIST",
    "MIX",
    "NEAREST",
    "RULES",
    "SHARED",
    "Pool",
    "Score",
    "scored",
]

FRESH, GENERALIST, NEAREST, MIX = "fresh", "generalist", "nearest", "mix"
RULES: Mapping[str, str] = {
    GENERALIST: "what all clients of the run have in common",
    NEAREST: "the one adapter with the lowest loss on the rows",
    MIX: "the few adapters with the lowest losses, weighted by them",
    FRESH: "nothing: a new adapter, as the run's clients began",
}
"""Ways to start; of two that are equally good the first is taken."""

SHARED = "*generalist"
"""Among names of clients, which have no star in them: what all have in common."""

FEW = 3
"""Most adapters in a mix, as many as a learned graph gives neighbours."""


@dataclass(frozen=True, slots=True)
class Score:
    """What an adapter is worth on some rows.

    Attributes:
        name: whose adapter.
        loss: nats per response token.
        behind: its loss above the best one's.
        error: standard error of that between rows; 0 for the best itself.
    """

    name: str
    loss: float
    behind: float = 0.0
    error: float = 0.0


@dataclass(frozen=True)
class Pool:
    """The adapters of a run, and the form of the newcomer's own.

    Attributes:
        adapters: of the run's clients, each read when it is asked for.
        scales: alpha / r of each.
        generalist: what they have in common, in the newcomer's form.
        fresh: the newcomer's adapter where it starts from nothing.
        rank: of the newcomer.
        scale: alpha / r of the newcomer.
    """

    adapters: Mapping[str, Adapter]
    scales: Mapping[str, float]
    generalist: Adapter
    fresh: Adapter
    rank: int
    scale: float

    def start(self, weights: Mapping[str, float]) -> Adapter:
        """The sum of some updates in the newcomer's rank and in the factors of a fresh start.

        Args:
            weights: of clients and of `SHARED`; with none the start is fresh.
        """
        if not weights:
            return self.fresh
        if dict(weights) == {SHARED: 1.0}:
            return self.generalist
        parts = [self.generalist if name == SHARED else self.adapters[name] for name in weights]
        scales = [self.scales.get(name, self.scale) for name in weights]
        shares = list(weights.values())
        mixed = mix(parts, shares, scales, self.rank, self.scale, self.fresh, split="turned")
        return mixed.adapter

    def weights(self, rule: str, scores: Sequence[Score]) -> dict[str, float]:
        """Who is in a start, and how much.

        Args:
            rule: one of `RULES`.
            scores: of the run's clients and of `SHARED`, the best first.

        Returns:
            Name -> weight; empty for a fresh start, and where nobody has a finite loss.
        """
        usable = [score for score in scores if math.isfinite(score.loss)]
        if rule == FRESH or not usable:
            return {}
        if rule == GENERALIST:
            return {SHARED: 1.0}
        if rule == NEAREST:
            return dict.fromkeys([each.name for each in usable if each.name != SHARED][:1], 1.0)
        few = usable[:FEW]
        raw = {score.name: math.exp(-_errors_behind(score)) for score in few}
        total = math.fsum(raw.values())
        return {name: weight / total for name, weight in raw.items() if weight / total > 1e-3}


def scored(
    losses: Mapping[str, Sequence[float]], tokens: Sequence[int], rows: Sequence[int]
) -> list[Score]:
    """Adapters by their loss on some rows, the best first; those that are not finite last.

    Args:
        losses: name -> the summed loss of each row, in nats.
        tokens: response tokens of each row.
        rows: which rows count, two at least.
    """
    counts = [tokens[row] for row in rows]
    total = sum(counts)
    means = {name: math.fsum(of[row] for row in rows) / total for name, of in losses.items()}
    order = sorted(means, key=lambda name: (not math.isfinite(means[name]), means[name]))
    best = losses[order[0]]
    found = []
    for name in order:
        if not math.isfinite(means[name]):
            found.append(Score(name, math.inf, math.inf))
            continue
        mean, error = mean_and_error([losses[name][row] - best[row] for row in rows], counts)
        found.append(Score(name, means[name], mean, error))
    return found


def _errors_behind(score: Score) -> float:
    if score.behind <= 0:
        return 0.0
    return score.behind / score.error if score.error > 0 else math.inf
