"""What one adapter merged of a fleet is worth on tasks that nobody of it has seen.

    python experiments/fleets/merge_unseen.py TASKS RUN... [--unseen 8] [--ways WAY...]
        [--output FILE.json]

RUN are run folders of train_apart.py, which trained on the first tasks; the last ones of TASKS are
unseen. Losses are nats per response token on their test rows, means over tasks and runs; the
difference to the base is paired by task, with a bootstrap over tasks.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from statistics import fmean, quantiles

from fedmira.data import load_clients
from fedmira.fleet import OwnRows, merge_fleet, read_fleet
from fedmira.studies.saved import clients_of, reload_adapters, trained_rows

DRAWS = 4000
WAYS = {
    "uniform": ("uniform", 1.0),
    "rows": ("rows", 1.0),
    "metagpt": ("metagpt", 1.0),
    "precision": ("precision", 1.0),
    "ties, rank 64": ("ties", 1.0),
    "metagpt, auto": ("metagpt", "auto"),
    "ties, rank 64, auto": ("ties", "auto"),
}


def main() -> None:
    """Measures all runs and prints a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--unseen", type=int, default=8)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    strengths: dict[str, list[float]] = defaultdict(list)
    for run in asked.runs:
        fleet, saved = read_fleet([run]), reload_adapters(run)
        judging = OwnRows.of_clients(clients_of(saved))
        config = saved.config
        data = config.data.model_copy(update={"clients": 0, "path": str(asked.tasks)})
        everybody = load_clients(data, config.seed, saved.kind.base.tokenizer).clients
        unseen = [each for each in everybody if each.client_id not in fleet.names][-asked.unseen :]
        rows = {client.client_id: client.test for client in unseen}
        testing = OwnRows(judging.kind, rows, judging.budget)
        none = {name: 0 * part for name, part in fleet.members[0].update.items()}
        for name, loss in testing.losses(dict.fromkeys(rows, none)).items():
            found["base"][name].append(loss.per_token)
        for way in asked.ways:
            by, strength = WAYS[way]
            rank = 64 if by == "ties" else None
            made = merge_fleet(
                fleet,
                by,
                strength=strength,
                rank=rank,
                rows=lambda own=judging: own,
                trained=lambda own=saved: trained_rows(own),
            )
            strengths[way].append(made.strength)
            print(run.name, way, made.strength, dict(made.tried), made.tail / made.norm, flush=True)
            for name, loss in testing.losses(dict.fromkeys(rows, made.update)).items():
                found[way][name].append(loss.per_token)
    lines = []
    for way, losses in found.items():
        differences = [fmean(of) - fmean(found["base"][name]) for name, of in losses.items()]
        draw = random.Random(1)
        drawn = [fmean(draw.choices(differences, k=len(differences))) for _ in range(DRAWS)]
        interval = quantiles(drawn, n=40)
        lines.append(
            {
                "way": way,
                "tasks": len(losses),
                "mean": round(fmean(fmean(of) for of in losses.values()), 4),
                "difference": round(fmean(differences), 4),
                "interval": [round(interval[0], 4), round(interval[-1], 4)],
                "strengths": strengths[way],
            }
        )
        print(json.dumps(lines[-1]))
    if asked.output:
        asked.output.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
