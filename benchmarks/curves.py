"""Cost curves of a round: seconds and peak memory against what makes a round large.

Clients a round, rank, length of the rows, and size of the base are varied one at a time.

    python benchmarks/curves.py --output benchmarks/results/curves.json
    python benchmarks/curves.py --curves rank,base --tools fedmira_cohort

Everything else stays at the standard: 8 clients, rank 16, the 3.1 M base, rows that share their
instruction. Every point is timed in turn with the others of its curve. Rows of one length are cut
from running text and share nothing; two clients train on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import provenance
from run import TOOLS, Case
from workload import make_workload

HERE = Path(__file__).resolve().parent

CURVES: dict[str, list[dict[str, Any]]] = {
    "clients": [{"clients": clients} for clients in (1, 2, 4, 8, 16, 32, 64)],
    "rank": [{"rank": rank} for rank in (4, 8, 16, 32, 64)],
    "length": [
        {"workload": f"length-{length}", "clients": 2} for length in (64, 128, 256, 512, 1024)
    ],
    "base": [{"model": model} for model in ("0.3m", "1m", "3m", "10m", "25m", "100m")],
}


def measure(
    points: list[dict[str, Any]], tools: list[str], repeats: int, rounds: int, threads: int
) -> list[dict[str, Any]]:
    """One entry for each point with the figures of each tool."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        cases = []
        for number, point in enumerate(points):
            place = Path(scratch) / str(number)
            make_workload(
                place / "workload", **{"workload": "shared", "model": "3m", **point}, rounds=rounds
            )
            cases.append(Case(place / "workload", place / "out", rounds, threads, "float32"))
            cases[-1].first_use(tools)
        runs: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for repeat in range(repeats + 1):
            for number, case in enumerate(cases):
                for tool in tools:
                    runs.setdefault((number, tool), []).append(
                        case.run(tool, sample_memory=repeat == 0)
                    )
                    print(f"  {repeat}/{repeats} {points[number]} {tool}", flush=True)
        return [
            {**point, "tools": {tool: _figures(runs[number, tool]) for tool in tools}}
            for number, point in enumerate(points)
        ]


def _figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [statistics.mean(run["seconds_per_round"][1:]) for run in runs[1:]]
    return {
        "seconds_per_round": {
            "median": statistics.median(seconds),
            "spread": [min(seconds), max(seconds)],
        },
        "tokens_per_round": statistics.mean(runs[-1]["tokens_per_round"][1:]),
        "peak_memory_bytes": runs[0]["peak_memory_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--curves", default=",".join(CURVES))
    parser.add_argument(
        "--tools", default="resident_peft,fedmira_cohort", help=f"of {', '.join(TOOLS)}"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--rounds", type=int, default=2, help="of each process; the first is start-up"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "curves.json")
    arguments = parser.parse_args()
    chosen = {key: getattr(arguments, key) for key in ("repeats", "rounds", "threads")}
    report: dict[str, Any] = {
        **provenance(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": chosen,
        "curves": {},
    }
    for curve in arguments.curves.split(","):
        print(f"against {curve}", flush=True)
        report["curves"][curve] = measure(CURVES[curve], arguments.tools.split(","), **chosen)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
