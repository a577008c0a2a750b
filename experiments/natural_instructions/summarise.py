"""Tables of a grid of runs, by number of training rows.

Mean, worst tenth, and how many clients are better and worse than local.

    python experiments/natural_instructions/summarise.py OUTPUT > table.md

Two read-outs of the same run: "last" is the last round; "best" is the round in which the client's
own validation loss was lowest. A client counts as better (worse) than local when its mean
difference over the seeds is beyond noise: more than two standard errors over the seeds, and more
than 2 % of local's loss.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

READ_OUTS = ("last", "best")
Losses = dict[str, dict[str, float]]  # read-out -> client -> test loss


def read_losses(folder: Path) -> Losses:
    """Test losses of both read-outs, and the base's."""
    history: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for line in (folder / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "evaluate":
            history[event["client"]].append(
                (event["round"], event["validation_loss"], event["test_loss"])
            )
    return {
        "base": {client: rows[0][2] for client, rows in history.items()},
        "last": {client: rows[-1][2] for client, rows in history.items()},
        "best": {client: min(rows, key=lambda row: row[1])[2] for client, rows in history.items()},
    }


def train_rows(folder: Path) -> dict[str, int]:
    with (folder / "metrics" / "clients.csv").open() as file:
        return {row["client"]: int(row["train_rows"]) for row in csv.DictReader(file)}


def worst_tenth(losses: dict[str, float]) -> float:
    count = math.ceil(len(losses) / 10)
    return fmean(sorted(losses.values())[-count:])


def verdicts(
    own: list[dict[str, float]], local: list[dict[str, float]], clients: list[str]
) -> tuple[float, float]:
    """Shares of clients beyond noise: (better, worse)."""
    better = worse = 0
    for client in clients:
        differences = [mine[client] - alone[client] for mine, alone in zip(own, local, strict=True)]
        error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
        limit = max(2 * error, 0.02 * fmean(alone[client] for alone in local))
        better += fmean(differences) < -limit
        worse += fmean(differences) > limit
    return better / len(clients), worse / len(clients)


def main() -> None:
    output = Path(sys.argv[1])
    runs: dict[tuple[str, str], dict[int, Losses]] = defaultdict(dict)
    rows: dict[str, int] = {}
    for folder in sorted(output.iterdir()):
        match = re.fullmatch(r"(.+)-p([\d.]+)-seed(\d+)", folder.name)
        status = folder / "run.json"
        if match and status.is_file() and json.loads(status.read_text())["status"] == "finished":
            runs[match[1], match[2]][int(match[3])] = read_losses(folder)
            rows = rows or train_rows(folder)
    sizes = sorted({min(16 * 2 ** round(math.log2(count / 16)), 128) for count in rows.values()})
    bins = {
        size: [
            c
            for c, count in rows.items()
            if min(16 * 2 ** round(math.log2(count / 16)), 128) == size
        ]
        for size in sizes
    }
    print(
        f"{len(rows)} clients; training rows: "
        f"{', '.join(f'about {size}: {len(clients)} clients' for size, clients in bins.items())}\n"
    )
    for participation in sorted({key[1] for key in runs}, reverse=True):
        for read_out in READ_OUTS:
            print(f"\n### Participation {participation}, {read_out} round\n")
            header = [
                "method",
                "seeds",
                "mean",
                "± seeds",
                "vs local",
                "worst tenth",
                "better",
                "worse",
                *(f"n={size}" for size in sizes),
            ]
            print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
            for method in [
                "base",
                *dict.fromkeys(key[0] for key in runs if key[1] == participation),
            ]:
                print(row(method, read_out, participation, runs, bins))


def row(
    method: str,
    read_out: str,
    participation: str,
    runs: dict[tuple[str, str], dict[int, Losses]],
    bins: dict[int, list[str]],
) -> str:
    local = runs["local", participation]
    own = local if method == "base" else runs[method, participation]
    seeds = sorted(set(own) & set(local))
    which = "base" if method == "base" else read_out
    mine, alone = [own[seed][which] for seed in seeds], [local[seed][read_out] for seed in seeds]
    means = [fmean(losses.values()) for losses in mine]
    difference = fmean(means) - fmean(fmean(losses.values()) for losses in alone)
    better, worse = verdicts(mine, alone, list(mine[0]))
    spread = stdev(means) if len(means) > 1 else 0.0
    by_size = [
        fmean(losses[client] for losses in mine for client in clients) for clients in bins.values()
    ]
    cells = [
        method,
        str(len(seeds)),
        f"{fmean(means):.3f}",
        f"{spread:.3f}",
        f"{difference:+.3f}",
        f"{fmean(map(worst_tenth, mine)):.3f}",
    ]
    cells += [f"{better:.0%}", f"{worse:.0%}", *(f"{value:.3f}" for value in by_size)]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
