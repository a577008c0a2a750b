"""What weighting rows by their advantage is worth where some targets are wrong and known to be.

    python experiments/advantages/measure.py TASKS OUTPUT.jsonl [--clients 6] [--seeds 0 1 2]
    python experiments/advantages/measure.py --summary OUTPUT.jsonl

TASKS is a folder of Natural Instructions tasks. Half of the clients have 30 % of their training
targets exchanged among each other, and these rows say advantage -1; all other rows say 0. Test rows
are as they were. Arms: `clean` (no target exchanged), `dropped` (exchanged rows left out), `even`
(all rows alike), and one for each temperature. A line of OUTPUT is a method, a seed and an arm.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import fedmira
from fedmira.config import DataSettings
from fedmira.data import read_rows

SHARE = 0.3
ROWS = 48
TEMPERATURES = (0.5, 0.25)
LOCAL = {"local.steps": 5, "local.batch_size": 8, "local.learning_rate": 3e-3}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % at n - 1 degrees


def main() -> None:
    """Measures, or summarises what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("places", type=Path, nargs="+")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["local"])
    asked = parser.parse_args()
    if asked.summary:
        summarise(lines_of(asked.places[0]))
        return
    tasks, output = asked.places
    done = {(line["method"], line["seed"], line["arm"]) for line in lines_of(output)}
    for seed in asked.seeds:
        clients, wrong = rows_of(tasks, asked.clients, seed)
        for method in asked.methods:
            for arm in ("clean", "dropped", "even", *TEMPERATURES):
                if (method, seed, arm) in done:
                    continue
                losses = run(method, arm, clients, wrong, seed, asked.rounds)
                line = {"method": method, "seed": seed, "arm": arm, "losses": losses}
                with output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(method, seed, arm, round(fmean(losses.values()), 4), flush=True)


def rows_of(tasks: Path, count: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """The rows of each client with those whose target is exchanged, and who has such rows."""
    settings = DataSettings(
        source="natural-instructions", path=str(tasks), clients=count, max_rows=ROWS, test_rows=32
    )
    read = read_rows(settings, seed)
    draw = random.Random(seed)
    clients: dict[str, Any] = {}
    wrong = [client.client_id for client in read.clients][::2]
    for client, split in zip(read.clients, read.splits, strict=True):
        train = [told(row) for row in split.train]
        chosen = draw.sample(range(len(train)), round(SHARE * len(train)))
        targets = [train[i]["output"] for i in chosen]
        for i, target in zip(chosen, targets[1:] + targets[:1], strict=True):
            train[i]["exchanged"] = target
        clients[client.client_id] = {"train": train, "test": [told(row) for row in split.test]}
    return clients, wrong


def told(row: Any) -> dict[str, Any]:
    """A row with its three texts."""
    return {"instruction": row.instruction, "input": row.input, "output": row.output}


def run(
    method: str, arm: str | float, clients: dict[str, Any], wrong: list[str], seed: int, rounds: int
) -> dict[str, float]:
    """Test losses after the last round, by client."""
    given = {
        name: {
            "train": [
                row
                for each in parts["train"]
                if (row := spoiled(each, arm if name in wrong else "clean")) is not None
            ],
            "test": parts["test"],
        }
        for name, parts in clients.items()
    }
    temperature = 0.0 if isinstance(arm, str) else arm
    with tempfile.TemporaryDirectory() as folder:
        result = fedmira.run(
            method=method,
            clients=given,
            settings={
                **LOCAL,
                "seed": seed,
                "rounds.count": rounds,
                "evaluation.every": 0,
                "evaluation.rouge": False,
                "data.max_length": 256,
                "data.ignore": ["exchanged"],
                "local.advantage_temperature": temperature,
            },
            output=Path(folder) / "run",
        )
        table = result.clients
        return {str(row.client): float(row.after_align_loss) for row in table.itertuples()}


def spoiled(row: dict[str, Any], arm: str | float) -> dict[str, Any] | None:
    """A row as an arm has it; None where the arm leaves it out."""
    if "exchanged" not in row or arm == "clean":
        return {**told_again(row), "advantage": 0.0}
    if arm == "dropped":
        return None
    return {**told_again(row), "output": row["exchanged"], "advantage": -1.0}


def told_again(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the target that might take the place of its own."""
    return {key: value for key, value in row.items() if key != "exchanged"}


def lines_of(path: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def summarise(lines: list[dict[str, Any]]) -> None:
    """Mean test loss of those with exchanged targets and of the others, and paired differences."""
    for method in dict.fromkeys(line["method"] for line in lines):
        own = [line for line in lines if line["method"] == method]
        names = sorted(own[0]["losses"])
        wrong, right = names[::2], names[1::2]
        even = means(own, "even", wrong), means(own, "even", right)
        print(
            f"| {method} | exchanged 30 % | minus even | others | minus even |",
            "|---|---|---|---|---|",
            sep="\n",
        )
        for arm in dict.fromkeys(line["arm"] for line in own):
            cells = []
            for group, base in zip((wrong, right), even, strict=True):
                found = means(own, arm, group)
                gained = [found[seed] - base[seed] for seed in sorted(base)]
                mean = fmean(gained)
                half = STUDENT[len(gained)] * stdev(gained) / len(gained) ** 0.5
                cells += [
                    f"{fmean(found.values()):.3f}",
                    f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]",
                ]
            print(f"| {arm} | {' | '.join(cells)} |")


def means(lines: list[dict[str, Any]], arm: Any, names: list[str]) -> dict[int, float]:
    """Seed -> mean test loss over these clients."""
    return {
        line["seed"]: fmean(line["losses"][name] for name in names)
        for line in lines
        if line["arm"] == arm
    }


if __name__ == "__main__":
    main()
