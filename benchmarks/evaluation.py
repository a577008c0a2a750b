"""Times whole runs with all their evaluations under two versions of fedmira, side by side.

    git worktree add ../before COMMIT
    python benchmarks/evaluation.py --before ../before/src --output evaluation.json
    python benchmarks/evaluation.py --before ../before/src --cases thousand --passes 1

Each pass runs every case once with either version, in turn, in processes of their own with a cache
folder of their own. Figures are seconds of processor time, user and system, of the whole process:
they hold on a machine that others use, too. A second run in the same cache folder is `again`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from machine import provenance
from watched_run import Watched, run_watched, write_clients

__all__ = ["main"]

ONE_PROCESS = {"engine.workers": 1, "engine.threads": 1, "engine.token_budget": 2048}
"""Without the trial of the token budget, which is of another machine each time."""

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "tasks": (
        0,
        {
            "data.source": "natural-instructions",
            "data.max_length": 256,
            "data.max_rows": 100,
            "data.train_fraction": None,
            "data.validation_fraction": 0.1,
            "data.test_rows": 16,
            "rounds.count": 2,
            "local.steps": 3,
            "local.batch_size": 8,
            "evaluation.every": 1,
            "evaluation.rouge": True,
        },
    ),
    "thousand": (1_000, {"rounds.count": 4, "rounds.participation": 0.02}),
    "ten-thousand": (10_000, {"rounds.count": 2, "rounds.participation": 0.002}),
}
"""Clients that are made up, none where rows are read, and settings."""


def parts(run: Watched) -> dict[str, float]:
    """Processor seconds of a run's parts."""
    ends = [sample.cpu_seconds for sample in run.samples]
    rounds = ends[-2] - ends[0] if len(ends) > 2 else 0.0  # noqa: PLR2004 - the last one evaluates
    return {
        "whole": run.total_cpu_seconds,
        "reading and first evaluation": ends[0],
        "rounds but the last": rounds,
        "last round, evaluation and saving": run.total_cpu_seconds - ends[0] - rounds,
    }


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """Medians of each case under both versions, and how many times as fast the later one is."""
    versions = {"before": given.before.resolve(), "after": given.after.resolve()}
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for _ in range(given.passes):
        for case in given.cases.split(","):
            clients, settings = CASES[case]
            of_case = found.setdefault(case, {})
            for version, source in versions.items():
                with tempfile.TemporaryDirectory() as folder:
                    place = Path(folder)
                    rows = write_clients(place / "rows.jsonl", clients) if clients else given.tasks
                    around = {"PYTHONPATH": str(source), "FEDMIRA_CACHE": str(place / "cache")}
                    for name in (version, f"{version}, again") if given.again else (version,):
                        run = run_watched(
                            rows,
                            place / name.replace(", ", "-"),
                            {**ONE_PROCESS, **settings, "algorithm.name": given.algorithm},
                            surroundings=around,
                        )
                        of_case.setdefault(name, []).append(parts(run))
                        print(case, name, of_case[name][-1], flush=True)
    return {case: compared(of_case) for case, of_case in found.items()}


def compared(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of each part, and their ratios."""
    medians = {
        name: {part: statistics.median(run[part] for run in passes) for part in passes[0]}
        for name, passes in runs.items()
    }
    ratios = {
        part: [
            before[part] / after[part]
            for before, after in zip(runs["before"], runs["after"], strict=True)
            if after[part]
        ]
        for part in runs["before"][0]
    }
    return {"cpu_seconds": medians, "times_as_fast": ratios, "passes": runs}


def main() -> None:
    """Measure, and write or print the JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("--before", type=Path, required=True, help="src of the earlier version")
    parser.add_argument("--after", type=Path, default=here / "src", help="src of the later version")
    parser.add_argument(
        "--tasks", type=Path, default=here.parent / "shared/data/natural-instructions"
    )
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--algorithm", default="mira")
    parser.add_argument("--again", action="store_true", help="also a second run with its cache")
    parser.add_argument("--output", type=Path, help="a JSON file; printed where it is not given")
    given = parser.parse_args()
    settings = {key: str(value) for key, value in vars(given).items() if key != "output"}
    document = {**provenance(), "settings": settings, "cases": measured(given)}
    text = json.dumps(document, indent=1) + "\n"
    if given.output:
        given.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
