"""How often `fedmira route` names the client whose test rows it is shown.

    python experiments/routing/measure.py RUN [RUN ...] --rows 12

Prints, for every run, the share of right answers by the text of one input, and by 1, 2, 4 and 8
rows with their answers, beside chance; and the share where the named client has the right category.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from fedmira.data import rows_of_clients
from fedmira.studies.saved import SavedAdapters, reload_adapters
from fedmira.studies.serving.routing import Router, Score

GROUPS = (1, 2, 4, 8)


def main() -> None:
    """Measures every run that is named, and prints a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=12, help="most test rows of a client")
    given = parser.parse_args()
    for run in given.runs:
        print(json.dumps({"run": run.name, **measure(reload_adapters(run), run, given.rows)}))


def measure(saved: SavedAdapters, run: Path, most: int) -> dict[str, object]:
    """Accuracy of a run's routing, over its clients' test rows."""
    index = json.loads((run / "adapters" / "index.json").read_text(encoding="utf-8"))
    category = {client: entry["category"] for client, entry in index.items()}
    router, hits, near, asked = Router(saved), dict[str, int](), dict[str, int](), dict[str, int]()

    def count(what: str, named: str, client: str) -> None:
        asked[what] = asked.get(what, 0) + 1
        hits[what] = hits.get(what, 0) + (named == client)
        near[what] = near.get(what, 0) + (category[named] == category[client])

    found = rows_of_clients(saved.config.data, saved.config.seed, most)
    for client in saved.adapters:
        rows = found[client]
        sums = [totals(router.by_rows([row])) for row in rows]
        for row in rows:
            count("text", router.by_text(row.input or row.instruction)[0].client, client)
        for size in GROUPS:
            for start in range(0, len(rows) - size + 1, size):
                count(f"{size} rows", best(sums[start : start + size]), client)
    return {
        "clients": len(saved.adapters),
        "chance": round(1 / len(saved.adapters), 3),
        **{
            what: {
                "asked": asked[what],
                "right": round(hits[what] / asked[what], 3),
                "right category": round(near[what] / asked[what], 3),
            }
            for what in asked
        },
    }


def totals(scores: Sequence[Score]) -> dict[str, float]:
    """Client -> the sum of the losses of a row."""
    return {score.client: score.loss * score.tokens for score in scores}


def best(sums: Sequence[dict[str, float]]) -> str:
    """The client with the lowest sum over several rows."""
    return min(sums[0], key=lambda client: sum(of_row[client] for of_row in sums))


if __name__ == "__main__":
    main()
