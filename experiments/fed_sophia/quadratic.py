"""Fed-Sophia, FedAvg with SGD and FedAvg with Adam on quadratic clients.

Rounds until the common loss is low.

    python experiments/fed_sophia/quadratic.py --output experiments/fed_sophia/quadratic.json

Client k has f_k(w) = 1/2 sum_i h_ki (w_i - c_ki)^2. Its curvatures h_ki spread over `condition`
along the coordinates and differ between clients by a factor of about exp(`spread`); the centres c_k
differ by `drift`. A round is J local steps of every client with fedmira's own optimizer step in
float64, then the mean. Sophia gets the exact curvature at the start of every round and keeps m and
h between rounds; Adam begins each round with empty moments ("fresh") or keeps them. Each optimizer
takes the learning rate of a common grid that has the fewest rounds.

The minimum of the mean loss is known, so the gap f(w) - f(w*) is exact. So is the limit of FedAvg
with SGD: with G_k = (I - mu H_k)^J it is the fixed point of mean_k (c_k + G_k (w - c_k)), which is
not w* where curvatures and centres both differ.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedmira.model.training.optimizers import CohortOptimizer, Moments, add_curvature

__all__ = ["Quadratics", "limit_of_sgd", "rounds_to", "run"]

CLIENTS, ENTRIES, LOCAL_STEPS, ROUNDS = 8, 64, 10, 200
GAPS = (1e-2, 1e-4)
RATES = tuple(round(base * 10.0**power, 12) for power in range(-5, 1) for base in (1, 3))
OPTIMIZERS = {
    "sgd": ("sgd", False),
    "adam, fresh": ("adam", False),
    "adam, kept": ("adam", True),
    "sophia, kept": ("sophia", True),
}


@dataclass(frozen=True)
class Quadratics:
    """Clients' losses: curvatures and centres, float64 [clients, entries].

    The loss that counts is their mean.
    """

    curvatures: Tensor
    centres: Tensor

    @classmethod
    def draw(cls, condition: float, spread: float, drift: float, seed: int = 0) -> Quadratics:
        """Curvatures from 1 / condition to 1 along the coordinates, times exp(spread z).

        Centres at a common one plus drift z.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        common = torch.logspace(
            -torch.log10(torch.tensor(condition)).item(), 0, ENTRIES, dtype=torch.float64
        )
        curvatures = common * torch.exp(spread * normal(CLIENTS, ENTRIES))
        return cls(curvatures, normal(1, ENTRIES) + drift * normal(CLIENTS, ENTRIES))

    @property
    def minimiser(self) -> Tensor:
        """Of the mean loss."""
        return (self.curvatures * self.centres).sum(0) / self.curvatures.sum(0)

    def gap(self, point: Tensor) -> float:
        """Mean loss at a point above its minimum: 1/2 sum_i mean_k h_ki (w_i - w*_i)^2."""
        return float((self.curvatures.mean(0) * (point - self.minimiser).square()).sum() / 2)

    def gradients(self, points: Tensor) -> Tensor:
        """Of each client at its own point."""
        return self.curvatures * (points - self.centres)


def run(
    problem: Quadratics, optimizer: str, kept: bool, rate: float, rounds: int = ROUNDS
) -> list[float]:
    """The gap before round 1 and after each round.

    It ends early below the smallest share, or where it diverges.
    """
    rule = CohortOptimizer(optimizer, rate, 0.0, gamma=1.0, rho=1.0)
    point, moments, everyone = (
        torch.zeros(ENTRIES, dtype=torch.float64),
        None,
        torch.arange(CLIENTS),
    )
    gaps = [problem.gap(point)]
    for _ in range(rounds):
        values = point.repeat(CLIENTS, 1)
        moments = moments if kept and moments is not None else Moments.empty(values)
        if optimizer == "sophia":  # N e * e is the curvature itself
            add_curvature(moments, problem.curvatures.sqrt(), everyone, torch.ones(CLIENTS))
        for _ in range(LOCAL_STEPS):
            rule.step(values, problem.gradients(values), moments, everyone)
        point = values.mean(0)
        gaps.append(problem.gap(point))
        if gaps[-1] <= min(GAPS) * gaps[0] or not gaps[-1] < 1e6 * gaps[0]:
            break
    return gaps


def limit_of_sgd(problem: Quadratics, rate: float, steps: int = LOCAL_STEPS) -> Tensor:
    """Where FedAvg with SGD ends: the fixed point of its mean step."""
    kept = (1 - rate * problem.curvatures) ** steps
    return ((1 - kept) * problem.centres).sum(0) / (1 - kept).sum(0)


def rounds_to(gaps: Sequence[float], share: float) -> int | None:
    """The first round whose gap is at most this share of the first gap.

    None where there is none.
    """
    return next((number for number, gap in enumerate(gaps) if gap <= share * gaps[0]), None)


def best(paths: Mapping[float, Sequence[float]], share: float) -> dict[str, float | int | None]:
    """Of the gaps by learning rate.

    The fewest rounds to a share of the first gap, at which rate, and the lowest share in that run.
    """
    rate, gaps = min(
        paths.items(), key=lambda each: (rounds_to(each[1], share) or 10 * ROUNDS, min(each[1]))
    )
    return {
        "learning_rate": rate,
        "rounds": rounds_to(gaps, share),
        "lowest_share": min(gaps) / gaps[0],
    }


def main() -> None:
    """Run all cases, print a table and write the JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="a JSON file")
    given = parser.parse_args()
    rows = []
    for spread, drift in ((0.0, 0.0), (0.0, 0.3), (0.5, 0.3)):
        for condition in (10.0, 100.0, 1000.0):
            problem = Quadratics.draw(condition, spread, drift)
            far = problem.gap(limit_of_sgd(problem, 0.1)) / problem.gap(
                torch.zeros(ENTRIES, dtype=torch.float64)
            )
            row: dict[str, object] = {
                "condition": condition,
                "spread": spread,
                "drift": drift,
                "limit_of_sgd_at_0.1": far,
            }
            for name, (optimizer, kept) in OPTIMIZERS.items():
                paths = {rate: run(problem, optimizer, kept, rate) for rate in RATES}
                row[name] = {f"{share:g}": best(paths, share) for share in GAPS}
            rows.append(row)
    settings = {
        "clients": CLIENTS,
        "entries": ENTRIES,
        "local_steps": LOCAL_STEPS,
        "most_rounds": ROUNDS,
        "learning_rates": RATES,
    }
    document = json.dumps({"settings": settings, "cases": rows}, indent=1)
    if given.output:
        given.output.write_text(document + "\n", encoding="utf-8")
    print(
        "| condition | spread | drift | "
        + " | ".join(f"{name}, {share:g}" for name in OPTIMIZERS for share in GAPS)
        + " |"
    )
    print("|" + "---|" * (3 + len(OPTIMIZERS) * len(GAPS)))
    for row in rows:
        cells = [row[name][f"{share:g}"]["rounds"] for name in OPTIMIZERS for share in GAPS]  # type: ignore[index]
        told = ["not reached" if cell is None else str(cell) for cell in cells]
        print(
            f"| {row['condition']:g} | {row['spread']} | {row['drift']} | "
            + " | ".join(told)
            + " |"
        )


if __name__ == "__main__":
    main()
