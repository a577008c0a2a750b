"""Compares memory and time per round and sampled client between few and many clients.

The same cohort is run out of both federations.

    python benchmarks/many_clients.py --output benchmarks/results/many-clients.json
    python benchmarks/many_clients.py --clients 100,400 --sampled 20 --rounds 4

The round is measured from the end of one to the end of the next: training, combining, events and
checkpoint. The first round and the last, which evaluates everybody, are left out. Sizes are run in
turn; ratios are to the first size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import provenance
from watched_run import Watched, run_watched, write_clients

__all__ = ["main"]


def figures(runs: Sequence[Watched], sampled: int) -> dict[str, Any]:
    """Medians over the repeated runs of one size."""
    rounds = [seconds for run in runs for seconds in run.round_seconds[:-1]]
    return {
        "start_seconds": statistics.median(run.samples[0].seconds for run in runs),
        "seconds_per_sampled_client": statistics.median(rounds) / sampled,
        "rounds_measured": len(rounds),
        "peak_bytes_in_rounds": max(run.samples[-2].peak_bytes for run in runs),
        "peak_bytes": max(run.peak_bytes for run in runs),
        "end_seconds": statistics.median(
            run.total_seconds - run.samples[-2].seconds for run in runs
        ),
        "open_files": max(sample.open_files for run in runs for sample in run.samples),
    }


def main() -> None:
    """Run all sizes in turn and write or print the JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--clients", default="200,10000", help="sizes of the federation, the reference first"
    )
    parser.add_argument("--sampled", type=int, default=100, help="clients of a round")
    parser.add_argument("--rounds", type=int, default=8, help="at least 4")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--algorithm", default="mira")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a JSON file; printed where it is not given")
    given = parser.parse_args()
    sizes = [int(size) for size in given.clients.split(",")]
    runs: dict[int, list[Watched]] = {size: [] for size in sizes}
    for _ in range(given.repeats):
        for size in sizes:
            settings = {
                "rounds.participation": given.sampled / size,
                "rounds.count": given.rounds,
                "algorithm.name": given.algorithm,
            }
            with tempfile.TemporaryDirectory() as folder:
                data = write_clients(Path(folder) / "clients.jsonl", size)
                runs[size].append(run_watched(data, Path(folder) / "run", settings, given.threads))
    found = {size: figures(runs[size], given.sampled) for size in sizes}
    small, large = found[sizes[0]], found[sizes[-1]]
    document = {
        **provenance(),
        "settings": {key: value for key, value in vars(given).items() if key != "output"},
        "sizes": {str(size): values for size, values in found.items()},
        "time_ratio": large["seconds_per_sampled_client"] / small["seconds_per_sampled_client"],
        "bytes_per_further_client": (large["peak_bytes"] - small["peak_bytes"])
        / (sizes[-1] - sizes[0])
        if len(sizes) > 1
        else 0.0,
    }
    text = json.dumps(document, indent=1) + "\n"
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
