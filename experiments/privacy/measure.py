"""What differential privacy of rows costs, and what a membership test still finds.

    python experiments/privacy/measure.py natural-instructions TASKS OUTPUT.jsonl [--seeds 0 1 2]
    python experiments/privacy/measure.py dolly ROWS.jsonl OUTPUT.jsonl
    python experiments/privacy/measure.py summary OUTPUT.jsonl

Needs the extra `privacy`. Eight clients of 64 rows train by federated averaging or alone, without
privacy and with `privacy.kind = "row"` at each epsilon; noise and batches are drawn from the run's
seed, as the rows are public. The test of the loss (Yeom et al. 2018, against the base): a row is
taken for one of training where its loss per token fell further from the base's to the adapter's.
Its AUC compares a client's training rows with its test rows. A line of OUTPUT is a seed and an arm.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from fedmira import load_config
from fedmira.adapters import Adapter
from fedmira.clients import LocalClients
from fedmira.experiment import build_experiment, run_experiment

__all__ = ["main"]

METHODS = ("fedavg", "local")
EPSILONS: tuple[float | None, ...] = (None, 8.0, 2.0)
DATA = {
    "natural-instructions": ["data.source=natural-instructions"],
    "dolly": ["data.source=dolly", "data.partition=category", "data.clients_per_category=1"],
}


def settings(data: str, path: str, method: str, epsilon: float | None, seed: int) -> list[str]:
    """Overrides of one run."""
    hidden = ["privacy.kind=row", f"privacy.epsilon={epsilon}", "privacy.draws=seeded"]
    return [
        *DATA[data],
        f"data.path={path}",
        "data.max_rows=64",
        "data.test_rows=24",
        "data.train_fraction=0.6",
        "data.max_length=192",
        f"algorithm.name={method}",
        "rounds.count=8",
        "local.steps=5",
        "local.batch_size=8",
        "local.learning_rate=3e-3",
        "evaluation.every=0",
        "evaluation.rouge=false",
        "engine.workers=1",
        f"seed={seed}",
        *(hidden if epsilon is not None else []),
    ]


def fallen(
    clients: LocalClients, before: Mapping[str, Adapter], after: Mapping[str, Adapter], split: str
) -> dict[str, list[float]]:
    """By how much the loss of each row fell, in nats per response token."""
    losses = [clients.row_losses(adapters, split) for adapters in (before, after)]  # type: ignore[arg-type]
    return {
        name: [
            (old - new) / len(row.response)
            for old, new, row in zip(
                losses[0][name], losses[1][name], getattr(clients.data[name], split), strict=True
            )
        ]
        for name in losses[0]
    }


def area(inside: Sequence[float], outside: Sequence[float]) -> float:
    """AUC: how often a row of training scores above a test row; ties count half."""
    wins = sum((a > b) + (a == b) / 2 for a in inside for b in outside)
    return wins / (len(inside) * len(outside))


def measured(
    data: str, path: str, method: str, epsilon: float | None, seed: int
) -> dict[str, object]:
    """A run: each client's test loss, and the AUC of the test against it."""
    config = load_config(overrides=settings(data, path, method, epsilon, seed))
    experiment = build_experiment(config)
    clients = experiment.clients
    assert isinstance(clients, LocalClients)
    with tempfile.TemporaryDirectory() as place:
        result = run_experiment(experiment, Path(place) / "run")
        after = dict(result.adapters)
        losses = {row["client"]: row["after_align_loss"] for row in result.clients}
    inside = fallen(clients, experiment.starts, after, "train")
    outside = fallen(clients, experiment.starts, after, "test")
    return {
        "data": data,
        "method": method,
        "epsilon": epsilon,
        "seed": seed,
        "test_loss": losses,
        "auc": {name: area(inside[name], outside[name]) for name in inside if name in outside},
    }


def summarise(path: Path) -> None:
    """The table of README.md."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    print("| data | method | epsilon | runs | mean test loss | mean AUC | highest AUC |")
    print("|---|---|---|---|---|---|---|")
    arms = dict.fromkeys((line["data"], line["method"], line["epsilon"]) for line in lines)
    for arm in arms:
        own = [line for line in lines if (line["data"], line["method"], line["epsilon"]) == arm]
        means = [fmean(line["test_loss"].values()) for line in own]
        areas = [value for line in own for value in line["auc"].values()]
        spread = f" ± {stdev(means):.3f}" if len(means) > 1 else ""
        data, method, epsilon = arm
        print(
            f"| {data} | {method} | {epsilon or 'none'} | {len(own)} | {fmean(means):.3f}{spread} "
            f"| {fmean(areas):.2f} | {max(areas):.2f} |"
        )


def main() -> None:
    """Measures what OUTPUT does not have yet, or prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=(*DATA, "summary"))
    parser.add_argument("places", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    output = Path(given.places[-1])
    if given.data == "summary":
        summarise(output)
        return
    lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    done = {
        (line["data"], line["method"], line["epsilon"], line["seed"])
        for line in map(json.loads, lines)
    }
    for seed in given.seeds:
        for method in METHODS:
            for epsilon in EPSILONS:
                if (given.data, method, epsilon, seed) in done:
                    continue
                line = measured(given.data, given.places[0], method, epsilon, seed)
                with output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
