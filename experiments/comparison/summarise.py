"""Mean test losses of a comparison's methods at the last and at each client's own best round, beside those of `local`.

    python experiments/comparison/summarise.py OUTPUT/natural_instructions

Reads the runs that have finished, so it can be called while others still train; a method is held against `local` on the seeds both have.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

READ_OUTS = {"last round": "after_align_loss", "own best round": "best_test_loss"}
MARGIN = 0.02
"""A client counts as better or worse beyond this share of its loss under `local`."""

Losses = Mapping[tuple[str, str], float]
"""(seed, client) -> test loss."""


def read(folder: Path) -> dict[str, dict[str, Losses]]:
    """Method -> read-out -> losses."""
    found: dict[str, dict[str, dict[tuple[str, str], float]]] = {}
    for path in sorted(folder.glob("*-seed*/metrics/clients.csv")):
        method, _, seed = path.parents[1].name.rpartition("-seed")
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for name, column in READ_OUTS.items():
                    found.setdefault(method, {}).setdefault(name, {})[seed, row["client"]] = float(row[column])
    return {method: dict(read_outs) for method, read_outs in found.items()}


def line(method: str, losses: Losses, local: Losses) -> str:
    """A row of the table."""
    seeds = sorted({seed for seed, _ in losses})
    common = sorted(losses.keys() & local.keys())
    changes = [losses[key] / local[key] - 1 for key in common]
    difference = statistics.mean(losses[key] - local[key] for key in common)
    better, worse = (sum(sign * change > MARGIN for change in changes) / len(changes) for sign in (-1, 1))
    mean = statistics.mean(losses.values())
    return f"| {method} | {len(seeds)} | {mean:.3f} | {difference:+.3f} | {better:.0%} | {worse:.0%} |"


def main() -> None:
    """Print a table for each read-out."""
    methods = read(Path(sys.argv[1]))
    for name in READ_OUTS:
        print(f"\n| {name} | seeds | mean test loss | vs local | better by more than 2 % | worse |\n|---|---|---|---|---|---|")
        for method in sorted(methods, key=lambda each: statistics.mean(methods[each][name].values())):
            print(line(method, methods[method][name], methods["local"][name]))


if __name__ == "__main__":
    main()
