"""Compute the golden losses anew: PYTHONPATH=tests python tests/golden/regenerate.py

Small runs of every algorithm on the tiny random Llama of `tiny.py` and the made-up clients of
`federation.py`. Do this only when a change is meant to change numbers, and say in the change log
why they changed.
"""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

from fedmira.experiment import build_experiment, run_experiment
from small import make_config, write_clients
from tiny import tiny_base

__all__ = ["GOLDEN", "RUNS", "losses"]

GOLDEN = Path(__file__).with_name("losses.json")

RUNS: dict[str, dict[str, Any]] = {
    "local": {"algorithm.name": "local"},
    "fedavg": {"algorithm.name": "fedavg"},
    "mira, recommended": {"algorithm.name": "mira", "adapter.ranks": {"birch-2": 2}},
    "two-level, recommended": {"algorithm.name": "two-level", "adapter.ranks": {"birch-2": 2}},
    "mira, as published": {
        "algorithm.name": "mira",
        "algorithm.space": "factor",
        "algorithm.server_step": 0.2,
        "algorithm.size_scale": 0.0,
        "algorithm.neighbours": "fresh",
        "graph.kind": "random",
        "rounds.sampling": "shepherd",
        "local.weight_decay": 0.1,
    },
}


def losses(name: str) -> dict[str, dict[str, float]]:
    """Losses of one run.

    Returns:
        "train" and "test": round -> mean over clients; "clients": client -> final test loss of its
            adapter.
    """
    settings = {"rounds.count": 4, "rounds.participation": 0.8, "evaluation.every": 2, **RUNS[name]}
    with tempfile.TemporaryDirectory() as place:
        config = make_config("tiny llama", write_clients(Path(place) / "clients"), settings)
        result = run_experiment(build_experiment(config, tiny_base()), Path(place) / "run")
        with (result.folder / "metrics" / "rounds.csv").open(encoding="utf-8", newline="") as file:
            rounds = list(csv.DictReader(file))
    return {
        "train": {row["round"]: float(row["train_loss"]) for row in rounds},
        "test": {row["round"]: float(row["test_loss"]) for row in rounds if row["test_loss"]},
        "clients": {row["client"]: row["after_align_loss"] for row in result.clients},
    }


if __name__ == "__main__":
    GOLDEN.write_text(
        json.dumps({name: losses(name) for name in RUNS}, indent=1) + "\n", encoding="utf-8"
    )
