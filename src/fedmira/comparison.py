"""The same data, seeds and budget for several algorithms; finished runs are not repeated, interrupted ones continue."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmira.config import Config, dump_config, with_algorithm
from fedmira.errors import RunError, RunFolderError
from fedmira.experiment import build_experiment, resume_experiment, run_experiment
from fedmira.model import BaseModel, load_base
from fedmira.report import write_comparison
from fedmira.rounds import Progress, RunFolder

__all__ = ["Comparison", "compare_algorithms"]

Watch = Callable[[str, int], AbstractContextManager[Progress]]
"""(name of the run, its rounds) -> a progress callback for its duration."""

_NOISE = 0.02
"""Losses within 2 % of local count as equal."""


@dataclass(frozen=True)
class Comparison:
    """Figures of all runs.

    Attributes:
        page: comparison.html.
        rows: per algorithm: mean and worst tenth of the test loss over clients (averaged over seeds), clients better and worse than local.
        runs: name of the run -> its folder.
    """

    page: Path
    rows: list[dict[str, Any]]
    runs: Mapping[str, Path]


def compare_algorithms(config: Config, algorithms: Sequence[str], seeds: Sequence[int], output: Path, watch: Watch) -> Comparison:
    """Run every algorithm with every seed into `output`/<algorithm>-seed<seed> and put the results side by side.

    Raises:
        InputError: a setting is wrong, or a folder of another comparison is in the way.
        RunError: a run failed; the table holds the algorithms whose runs all finished. Call again to continue.
    """
    plans = [
        (f"{name}-seed{seed}", with_algorithm(config, name).model_copy(update={"seed": seed})) for seed in seeds for name in algorithms
    ]
    base: BaseModel | None = None
    failures: dict[str, RunError] = {}
    for name, plan in plans:
        folder = output / name
        if RunFolder(folder).read_json("run.json").get("status") == "finished":
            if (folder / "config.toml").read_text(encoding="utf-8") != dump_config(plan):
                raise RunFolderError(f"{folder}: this run was made with other settings; choose another --output")
            continue
        base = base or load_base(config.model)
        experiment = build_experiment(plan, base)
        start = resume_experiment if (folder / "config.toml").exists() else run_experiment
        try:
            with watch(name, plan.rounds.count) as progress:
                start(experiment, folder, progress)
        except RunError as error:  # the other algorithms are still worth comparing
            failures[name] = error
    runs = {name: output / name for name, _ in plans if name not in failures}
    losses = {name: _client_losses(folder) for name, folder in runs.items()}
    rows = [_row(name, seeds, losses) for name in algorithms if all(f"{name}-seed{seed}" in losses for seed in seeds)]
    comparison = Comparison(write_comparison(runs, output / "comparison.html") if runs else output, rows, runs)
    if rows:
        _write(output, rows)
    if failures:
        reasons = "; ".join(f"{name}: {error}" for name, error in failures.items())
        raise RunError(f"{len(failures)} of {len(plans)} runs failed ({reasons}); the others are compared in {comparison.page}")
    return comparison


def _client_losses(folder: Path) -> dict[str, float]:
    text = (RunFolder.reopen(folder).metrics / "clients.csv").read_text(encoding="utf-8")
    return {row["client"]: float(row["after_align_loss"]) for row in csv.DictReader(io.StringIO(text))}


def _row(algorithm: str, seeds: Sequence[int], losses: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    per_seed = [losses[f"{algorithm}-seed{seed}"] for seed in seeds]
    means = [sum(values.values()) / len(values) for values in per_seed]
    worst = [sum(sorted(values.values())[-tenth:]) / tenth for values in per_seed for tenth in [-(-len(values) // 10)]]
    row: dict[str, Any] = {
        "algorithm": algorithm,
        "seeds": len(seeds),
        "test_loss": sum(means) / len(means),
        "worst_tenth": sum(worst) / len(worst),
    }
    against = [losses.get(f"local-seed{seed}") for seed in seeds]
    pairs = [(values[client], alone[client]) for values, alone in zip(per_seed, against, strict=True) if alone for client in values]
    if pairs:
        row["better_than_local"] = sum(own < alone * (1 - _NOISE) for own, alone in pairs)
        row["worse_than_local"] = sum(own > alone * (1 + _NOISE) for own, alone in pairs)
    return row


def _write(output: Path, rows: list[dict[str, Any]]) -> None:
    (output / "comparison.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    with (output / "comparison.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[-1]), restval="")
        writer.writeheader()
        writer.writerows(rows)
