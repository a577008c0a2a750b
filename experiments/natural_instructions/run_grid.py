"""Local training, FedIT and MIRA with four graphs on Natural Instructions tasks.

The tasks are those of a folder; data, seeds and steps are equal.

    python experiments/natural_instructions/run_grid.py --tasks TASKS --output runs/ni44 [--share
    0/2]

Each run goes to OUTPUT/<method>-p<participation>-seed<seed>; finished runs are skipped and
interrupted ones continue, so the same command may be given again. With --share i/n a process takes
every n-th run; two processes with OMP_NUM_THREADS=1 are faster than one with two threads. Then:
python experiments/natural_instructions/summarise.py OUTPUT
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from fedmira.config import Config, load_config
from fedmira.experiment import build_experiment, resume_experiment, run_experiment
from fedmira.model import load_base

METHODS = {
    "local": ["algorithm.name=local"],
    "fedit": ["algorithm.name=fedavg"],
    "mira-similarity": [],
    "mira-shuffled": ["graph.shuffled=true"],
    "mira-category": ["graph.kind=category"],
    "mira-random": ["graph.kind=random"],
}
LOCAL_ROUNDS = 6  # rounds in which each client trains, on average, whatever the participation
PARTICIPATIONS = (1.0, 0.25)
COMMON = [
    "algorithm.name=mira",
    "data.source=natural-instructions",
    "data.train_fraction=0.6",
    "data.validation_fraction=0.12",
    "data.test_rows=16",
    "data.max_rows=[16, 32, 64, 128]",
    "data.max_length=256",
    "local.steps=5",
    "local.batch_size=4",
    "evaluation.rouge=false",
]


def settings(tasks: Path, method: str, participation: float, seed: int, extra: list[str]) -> Config:
    rounds = round(LOCAL_ROUNDS / participation)
    own = [
        f"seed={seed}",
        f"data.path={tasks}",
        f"rounds.count={rounds}",
        f"rounds.participation={participation}",
        f"evaluation.every={rounds // 3}",
    ]
    return load_config(None, None, [*COMMON, *own, *METHODS[method], *extra])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--participations", default=",".join(map(str, PARTICIPATIONS)))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--set", action="append", default=[], dest="extra")
    arguments = parser.parse_args()
    plan = [
        (method, float(participation), int(seed))
        for participation in arguments.participations.split(",")
        for seed in arguments.seeds.split(",")
        for method in arguments.methods.split(",")
    ]
    own, of = map(int, arguments.share.split("/"))
    base = None
    for method, participation, seed in plan[own::of]:
        folder = arguments.output / f"{method}-p{participation:g}-seed{seed}"
        if (folder / "run.json").is_file() and json.loads((folder / "run.json").read_text())[
            "status"
        ] == "finished":
            continue
        config = settings(arguments.tasks, method, participation, seed, arguments.extra)
        base = base or load_base(config.model)
        begun = time.monotonic()
        start = resume_experiment if (folder / "config.toml").exists() else run_experiment
        result = start(build_experiment(config, base), folder)
        print(
            f"{folder.name}: test loss {result.summary['after_align_loss']['mean']:.4f} "
            f"after {time.monotonic() - begun:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
