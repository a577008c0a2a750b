"""What weighting rows by their advantage is worth where some targets are wrong and known to be.

    python experiments/advantages/measure.py TASKS OUTPUT.jsonl [--clients 4] [--seeds 0 1 2]
    python experiments/advantages/measure.py --summary OUTPUT.jsonl

TASKS is a folder of Natural Instructions tasks. Every client has 30 % of its training targets
exchanged among each other, and these rows say advantage -1; all other rows say 0. Test rows are as
they were. Arms: `clean` (no target exchanged), `dropped` (exchanged rows left out), `even` (all
rows alike), and one for each temperature. Clients train alone. A line of OUTPUT is a seed: arm ->
client -> test loss.
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
ARMS = ("clean", "dropped", "even", *TEMPERATURES)
LOCAL = {"local.steps": 5, "local.batch_size": 8, "local.learning_rate": 3e-3}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % at n - 1 degrees


def main() -> None:
    """Measures, or summarises what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("places", type=Path, nargs="+")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    if asked.summary:
        summarise(lines_of(asked.places[0]))
        return
    tasks, output = asked.places
    done = {line["seed"] for line in lines_of(output)}
    for seed in asked.seeds:
        if seed in done:
            continue
        clients = rows_of(tasks, asked.clients, seed)
        losses = {str(arm): run(clients, arm, seed, asked.rounds) for arm in ARMS}
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"seed": seed, "losses": losses}) + "\n")
        print(seed, {arm: round(fmean(of.values()), 4) for arm, of in losses.items()}, flush=True)


def rows_of(tasks: Path, count: int, seed: int) -> dict[str, Any]:
    """The rows of each client, with another target beside those whose target is exchanged."""
    settings = DataSettings(
        source="natural-instructions", path=str(tasks), clients=count, max_rows=ROWS, test_rows=32
    )
    read = read_rows(settings, seed)
    draw = random.Random(seed)
    clients: dict[str, Any] = {}
    for client, split in zip(read.clients, read.splits, strict=True):
        train = [told(row) for row in split.train]
        chosen = draw.sample(range(len(train)), round(SHARE * len(train)))
        targets = [train[i]["output"] for i in chosen]
        for i, target in zip(chosen, targets[1:] + targets[:1], strict=True):
            train[i]["exchanged"] = target
        clients[client.client_id] = {"train": train, "test": [told(row) for row in split.test]}
    return clients


def told(row: Any) -> dict[str, Any]:
    """A row with its three texts."""
    return {"instruction": row.instruction, "input": row.input, "output": row.output}


def run(clients: dict[str, Any], arm: str | float, seed: int, rounds: int) -> dict[str, float]:
    """Client -> test loss after the last round; all arms have the same draws of batches."""
    given = {
        name: {
            "train": [row for each in parts["train"] if (row := spoiled(each, arm)) is not None],
            "test": parts["test"],
        }
        for name, parts in clients.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        result = fedmira.run(
            method="local",
            clients=given,
            settings={
                **LOCAL,
                "seed": seed,
                "rounds.count": rounds,
                "evaluation.every": 0,
                "evaluation.rouge": False,
                "data.max_length": 160,
                "local.advantage_temperature": arm if isinstance(arm, float) else 0.0,
            },
            output=Path(folder) / "run",
        )
        table = result.clients
        return {str(row.client): float(row.after_align_loss) for row in table.itertuples()}


def spoiled(row: dict[str, Any], arm: str | float) -> dict[str, Any] | None:
    """A row as an arm has it; None where the arm leaves it out."""
    own = {key: value for key, value in row.items() if key != "exchanged"}
    if "exchanged" not in row or arm == "clean":
        return {**own, "advantage": 0.0}
    if arm == "dropped":
        return None
    return {**own, "output": row["exchanged"], "advantage": -1.0}


def lines_of(path: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def summarise(lines: list[dict[str, Any]]) -> None:
    """Mean test loss of each arm, and its difference to `even` paired by seed."""
    print("| | test loss | minus even |\n|---|---|---|")
    for arm in map(str, ARMS):
        found = [fmean(line["losses"][arm].values()) for line in lines]
        even = [fmean(line["losses"]["even"].values()) for line in lines]
        gained = [one - other for one, other in zip(found, even, strict=True)]
        mean = fmean(gained)
        half = STUDENT[len(gained)] * stdev(gained) / len(gained) ** 0.5
        print(
            f"| {arm} | {fmean(found):.3f} | {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}] |"
        )


if __name__ == "__main__":
    main()
