"""What sub-goals are worth to an executor, and what planner and executor are worth to each other.

    python experiments/trajectories/measure.py OUTPUT.jsonl [--seeds 0 1 2] [--rounds 4]
    python experiments/trajectories/measure.py --summary OUTPUT.jsonl

ScienceWorld, which the paper measures on, is not here. The trajectories are of a small text
household that this script plays: in each of three homes things have to be found, perhaps washed or
warmed, and put away, and the program that plays it writes its sub-goals. Arms: `alone` (planners
and executors by themselves), `bare` (executors whose rows tell no sub-goal), `mira` with the
category graph, which pairs a home's planner and executor, and `mira-shuffled`, which pairs others.
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

HOMES = {
    "cabin": ("porch", "loft", "stove room"),
    "flat": ("hall", "bath", "kitchen"),
    "farm": ("yard", "barn", "dairy"),
}
THINGS = ("cup", "towel", "apple", "pan", "book", "shirt", "egg", "lamp")
PLACES = ("shelf", "box", "table", "drawer")
CHANGES = {"": "", "wash": "sink", "warm": "oven"}
COUNT = 24
ROWS = {"train_fraction": 0.7, "max_rows": 32, "test_rows": 24}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % at n - 1 degrees


def main() -> None:
    """Measures, or summarises what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    if asked.summary:
        summarise(lines_of(asked.output))
        return
    done = {(line["seed"], line["arm"]) for line in lines_of(asked.output)}
    for seed in asked.seeds:
        with tempfile.TemporaryDirectory() as folder:
            write_homes(Path(folder), seed)
            for arm in ("alone", "bare", "mira", "mira-shuffled"):
                if (seed, arm) in done:
                    continue
                losses = run(Path(folder), arm, seed, asked.rounds)
                line = {"seed": seed, "arm": arm, "losses": losses}
                with asked.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(seed, arm, round(fmean(losses.values()), 4), flush=True)


def write_homes(folder: Path, seed: int) -> None:
    """A file of trajectories for each home."""
    for home, rooms in HOMES.items():
        draw = random.Random(f"{home} {seed}")
        lines = [json.dumps(played(rooms, draw)) for _ in range(COUNT)]
        (folder / f"{home}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def played(rooms: tuple[str, ...], draw: random.Random) -> dict[str, Any]:
    """A trajectory: find a thing, perhaps change it, and put it away."""
    thing, place, change = draw.choice(THINGS), draw.choice(PLACES), draw.choice(list(CHANGES))
    here, there = draw.choice(rooms), draw.choice(rooms)
    task = f"{f'{change} the {thing} and ' if change else ''}put the {thing} in the {place}."
    steps: list[dict[str, Any]] = []
    held = "nothing"

    def do(subgoal: str, action: str, seen: str, reward: float = 0) -> None:
        steps.append(
            {
                "subgoal": subgoal,
                "action": action,
                "observation": seen,
                "reward": reward,
                "environment": f"You are in the {here}.",
                "inventory": held,
            }
        )

    for room in draw.sample([room for room in rooms if room != here], 2):
        if here == there:
            break
        do(f"find the {thing}", f"go to {room}", f"The {room}.")
        here = room
    do(f"find the {thing}", f"take {thing}", f"You hold the {thing}.", 0.3)
    held = thing
    if change:
        tool, where = CHANGES[change], rooms[-1]
        goal = f"{change} the {thing} in the {tool}"
        if here != where:
            do(goal, f"go to {where}", f"The {where}.")
            here = where
        do(goal, f"use {tool} on {thing}", f"The {thing} is done.", 0.3)
    if here != rooms[0]:
        do(f"put the {thing} away", f"go to {rooms[0]}", f"The {rooms[0]}.")
        here = rooms[0]
    do(f"put the {thing} away", f"put {thing} in {place}", "Well done.", 0.4)
    return {"task": task[0].upper() + task[1:], "steps": steps}


def run(folder: Path, arm: str, seed: int, rounds: int) -> dict[str, float]:
    """Test losses after the last round, by client."""
    settings: dict[str, Any] = {
        "seed": seed,
        "rounds.count": rounds,
        "local.steps": 5,
        "local.batch_size": 4,
        "evaluation.every": 0,
        "evaluation.rouge": False,
        "data.max_length": 256,
    }
    data: dict[str, Any] = {"source": "trajectories", "path": str(folder), **ROWS}
    clients: dict[str, Any] | None = None
    if arm == "bare":
        clients = bare(data, seed)
    else:
        settings |= {f"data.{key}": value for key, value in data.items()}
    method = "local"
    if arm.startswith("mira"):
        method = "mira"
        settings |= {"graph.kind": "category", "graph.shuffled": arm == "mira-shuffled"}
    with tempfile.TemporaryDirectory() as output:
        result = fedmira.run(
            method=method, clients=clients, settings=settings, output=Path(output) / "run"
        )
        table = result.clients
        return {str(row.client): float(row.after_align_loss) for row in table.itertuples()}


def bare(data: dict[str, Any], seed: int) -> dict[str, Any]:
    """Executors on the same sides, with rows that tell no sub-goal."""
    read = read_rows(DataSettings(**data, emit="executor"), seed)
    return {
        client.client_id: {
            part: [
                {
                    "instruction": "Name the next action of the task.",
                    "input": "\n".join(
                        line for line in row.input.splitlines() if "sub-goal" not in line
                    ),
                    "output": row.output,
                }
                for row in rows
            ]
            for part, rows in (("train", split.train), ("test", split.test))
        }
        for client, split in zip(read.clients, read.splits, strict=True)
    }


def lines_of(path: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def summarise(lines: list[dict[str, Any]]) -> None:
    """Mean test loss of executors and planners, and the paired difference to `alone` by seed."""
    print("| | executors | minus alone | planners | minus alone |\n|---|---|---|---|---|")
    for arm in dict.fromkeys(line["arm"] for line in lines):
        cells = []
        for role in ("executor", "planner"):
            found, alone = means(lines, arm, role), means(lines, "alone", role)
            if not found:
                cells += ["", ""]
                continue
            gained = [found[seed] - alone[seed] for seed in sorted(found)]
            mean = fmean(gained)
            half = STUDENT[len(gained)] * stdev(gained) / len(gained) ** 0.5
            cells += [
                f"{fmean(found.values()):.3f}",
                f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]",
            ]
        print(f"| {arm} | {' | '.join(cells)} |")


def means(lines: list[dict[str, Any]], arm: str, role: str) -> dict[int, float]:
    """Seed -> mean test loss over the clients of a role."""
    found = {}
    for line in lines:
        own = [loss for name, loss in line["losses"].items() if name.endswith(role)]
        if line["arm"] == arm and own:
            found[line["seed"]] = fmean(own)
    return found


if __name__ == "__main__":
    main()
