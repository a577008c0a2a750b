"""Mean test losses of a comparison's methods beside those of `local`.

At the last round, and at each client's own best one.

    python experiments/comparison/summarise.py OUTPUT/natural_instructions

Reads the runs that have finished, so it can be called while others still train. A method is held
against `local` on the seeds that both have, with the pairing, the interval and the verdict of the
package's own tables; its mean is over these seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from fedmira.report import Run, read_run
from fedmira.report.comparison_figures import BASELINE, pools_of
from fedmira.report.paired import (
    LEVEL,
    NOISE_RULE,
    Losses,
    Pairing,
    pair,
)

READ_OUTS = {"last round": "after_align_loss", "own best round": "best_test_loss"}
VERDICTS = ("better", "equal", "worse")


def finished_runs(folder: Path) -> dict[str, dict[int, Run]]:
    """Method -> seed -> its run."""
    found: dict[str, dict[int, Run]] = {}
    for path in sorted(folder.glob("*-seed*/metrics/clients.csv")):
        method, _, seed = path.parents[1].name.rpartition("-seed")
        run = read_run(path.parents[1])
        if run.status == "finished":
            found.setdefault(method, {})[int(seed)] = run
    return found


def losses_of(runs: Mapping[int, Run], column: str) -> Losses:
    """Test losses of a read-out, of the clients that were measured."""
    measured = {
        seed: {row.client: getattr(row, column) for row in run.clients}
        for seed, run in runs.items()
    }
    return {
        seed: {client: loss for client, loss in losses.items() if loss is not None}
        for seed, losses in measured.items()
    }


def line(method: str, found: Pairing) -> str:
    """A row of the table."""
    counts = {verdict: found.count(verdict) for verdict in VERDICTS}
    shares = [f"{count} ({count / len(found.clients):.0%})" for count in counts.values()]
    difference = f"{found.difference:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
    cells = [method, str(found.seeds), f"{own_mean(found):.3f}", difference, *shares]
    return "| " + " | ".join(cells) + " |"


def own_mean(found: Pairing) -> float:
    """Over clients and the common seeds."""
    return sum(client.own for client in found.clients.values()) / len(found.clients)


def main() -> None:
    """Print a table for each read-out."""
    methods = finished_runs(Path(sys.argv[1]))
    if BASELINE not in methods:
        raise SystemExit(
            f"{sys.argv[1]}: no finished run of {BASELINE!r}, which the others are held against"
        )
    pools = pools_of([run for runs in methods.values() for run in runs.values()])
    for name, column in READ_OUTS.items():
        losses = {method: losses_of(runs, column) for method, runs in methods.items()}
        pairings = {
            method: found
            for method in methods
            if (found := pair(losses[method], losses[BASELINE], pools)) is not None
        }
        print(
            f"\n| {name} | seeds | mean test loss | vs {BASELINE} ({LEVEL:.0%} interval) | "
            "better | equal | worse |"
        )
        print("|---|---|---|---|---|---|---|")
        print(
            "\n".join(
                line(method, pairings[method])
                for method in sorted(pairings, key=lambda each: own_mean(pairings[each]))
            )
        )
    over = "clients" if pools is None else "categories with all their clients"
    print(f"\nIntervals by resampling {over}, and seeds where there are several. {NOISE_RULE}")


if __name__ == "__main__":
    main()
