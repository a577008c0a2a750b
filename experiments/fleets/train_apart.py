"""Trains one adapter a Natural Instructions task with nobody else: a fleet to align or merge.

    python experiments/fleets/train_apart.py TASKS OUTPUT [--clients 24] [--seed 0] [--rounds 2]
        [--own-starts]

The run is `local` with the settings of ../comparison/natural_instructions.toml. With --own-starts
every client's A is drawn by a seed of its own, as where adapters were made by people who know
nothing of each other; without it all clients share the start of the run.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from fedmira.config import load_config
from fedmira.experiment import build_experiment, run_experiment
from fedmira.model import start_adapter

SETTINGS = Path(__file__).parent.parent / "comparison" / "natural_instructions.toml"


def main() -> None:
    """Trains the fleet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--own-starts", action="store_true")
    asked = parser.parse_args()
    config = load_config(
        SETTINGS,
        None,
        [
            "algorithm.name=local",
            f"seed={asked.seed}",
            f"data.path={asked.tasks}",
            f"data.clients={asked.clients}",
            f"rounds.count={asked.rounds}",
            "evaluation.every=0",
        ],
    )
    experiment = build_experiment(config)
    if asked.own_starts:
        starts = {
            client: start_adapter(experiment.targets, rank, 1000 * asked.seed + number)
            for number, (client, rank) in enumerate(experiment.ranks.items(), start=1)
        }
        experiment = replace(experiment, starts=starts)
    run_experiment(experiment, asked.output)


if __name__ == "__main__":
    main()
