"""Runs many rounds and notes memory and open files after each: neither may grow.

    python benchmarks/soak.py --output benchmarks/results/soak.json
    python benchmarks/soak.py --rounds 40 --clients 30 --kept

All clients are evaluated now and then, and with --kept every client keeps its optimizer moments:
all that a run can pile up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from machine import provenance
from watched_run import Sample, run_watched, write_clients

__all__ = ["main"]

WARM_UP = 20
"""Rounds after which nothing may grow."""
FIRST, LAST = 10, 30
"""Rounds after the warm-up, and rounds at the end, that are compared."""


def growth(samples: Sequence[Sample]) -> dict[str, Any]:
    """Rounds 21 to 30 against the last 30: medians, and the highest of each.

    With less than 60 rounds some stand on both sides.
    """
    later = [sample for sample in samples if sample.round > WARM_UP]
    begin, end = later[:FIRST], later[-LAST:]
    memory = [statistics.median(sample.resident_bytes for sample in part) for part in (begin, end)]
    return {
        "resident_bytes_rounds_21_to_30": memory[0],
        "resident_bytes_last_30_rounds": memory[1],
        "resident_growth": memory[1] / memory[0] - 1,
        "highest_resident_bytes": [
            max(sample.resident_bytes for sample in part) for part in (begin, end)
        ],
        "open_files": sorted({sample.open_files for sample in later}),
        "mapped_files": sorted({sample.mapped_files for sample in later}),
    }


def main() -> None:
    """Run, and write or print the JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=300, help=f"more than {WARM_UP}")
    parser.add_argument("--participation", type=float, default=0.1)
    parser.add_argument("--every", type=int, default=25, help="rounds between evaluations")
    parser.add_argument("--algorithm", default="mira")
    parser.add_argument(
        "--kept",
        action="store_true",
        help="clients keep their optimizer moments (mira then mixes factors)",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a JSON file; printed where it is not given")
    given = parser.parse_args()
    settings: dict[str, Any] = {
        "rounds.count": given.rounds,
        "rounds.participation": given.participation,
        "evaluation.every": given.every,
        "algorithm.name": given.algorithm,
    }
    if given.kept:
        settings |= {"local.optimizer_state": "kept"} | (
            {"algorithm.space": "factor"} if given.algorithm == "mira" else {}
        )
    with tempfile.TemporaryDirectory() as folder:
        data = write_clients(Path(folder) / "clients.jsonl", given.clients)
        watched = run_watched(data, Path(folder) / "run", settings, given.threads)
        stored = len(list((Path(folder) / "run" / "checkpoint" / "adapters").iterdir()))
    document = {
        **provenance(),
        "settings": {key: value for key, value in vars(given).items() if key != "output"},
        **growth(watched.samples),
        "files_in_store": stored,
        "seconds": watched.total_seconds,
        "samples": [asdict(sample) for sample in watched.samples],
    }
    text = json.dumps(document, indent=1) + "\n"
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
