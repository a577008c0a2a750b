"""One global model against each category's losses.

The mean test loss by round, and those of the categories, from a run folder.

    python experiments/one_model/per_category.py RUN [RUN ...] > table.md

MIRA's Figure 2 (arXiv 2410.15524) motivates adapters of one's own with FedKSeed: the mean over
clients falls while single kinds of tasks stand still or get worse. Any run that was evaluated after
several rounds can be read.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

MARGIN = 0.02
"""A client's loss has fallen or risen beyond this share of the base's."""


def read(folder: Path) -> tuple[dict[str, str], dict[int, dict[str, float]]]:
    """Client -> category, and round -> client -> test loss."""
    with (folder / "metrics" / "clients.csv").open(encoding="utf-8", newline="") as file:
        category = {row["client"]: row["category"] for row in csv.DictReader(file)}
    losses: dict[int, dict[str, float]] = defaultdict(dict)
    for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "evaluate":
            losses[event["round"]][event["client"]] = event["test_loss"]
    return category, dict(sorted(losses.items()))


def print_tables(folder: Path) -> None:
    """The mean and the categories by round, and how many clients end below and above the base."""
    category, losses = read(folder)
    rounds = list(losses)
    members: dict[str, list[str]] = defaultdict(list)
    for client, name in category.items():
        members[name].append(client)
    print(
        f"\n{folder.name}\n\n| category | clients | "
        f"{' | '.join(f'round {number}' for number in rounds)} "
        f"|\n|---|---|{'---|' * len(rounds)}"
    )
    for name, clients in {"all": list(category), **dict(sorted(members.items()))}.items():
        means = [fmean(losses[number][client] for client in clients) for number in rounds]
        cells = " | ".join(f"{mean:.3f}" for mean in means)
        print(f"| {name} | {len(clients)} | {cells} |")
    first, last = losses[rounds[0]], losses[rounds[-1]]
    fallen, risen = (
        sum(sign * (last[client] / first[client] - 1) > MARGIN for client in category)
        for sign in (-1, 1)
    )
    print(
        f"\nAgainst the base, by more than {MARGIN:.0%}: {fallen} of {len(category)} "
        f"clients fell, {risen} rose."
    )


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    for folder in sys.argv[1:]:
        print_tables(Path(folder))


if __name__ == "__main__":
    main()
