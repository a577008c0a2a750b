"""What reference decoding is worth to clients of few rows, and what it costs.

    python experiments/references/measure.py TASKS OUTPUT.jsonl [--seeds 0 1 2] [--rows 16]
    python experiments/references/measure.py --summary OUTPUT.jsonl

Clients of 16 training rows are trained alone on the bundled base. Of the shares 0, 0.1, 0.3 and 0.5
each client takes the one with the lowest loss on its validation rows (`chosen`). A line of OUTPUT
is a seed and a client: for each share validation and test loss, exact match, and tokens a second.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import fedmira
from fedmira.clients import LocalClients, references_of
from fedmira.metrics import text_scores
from fedmira.studies.saved import clients_of, reload_adapters

SHARES = (0.0, 0.1, 0.3, 0.5)
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % at n - 1 degrees


def main() -> None:
    """Measures, or summarises what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("places", type=Path, nargs="+")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
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
        settings = {
            "data.source": "natural-instructions",
            "data.path": str(tasks.resolve()),
            "data.clients": asked.clients,
            "data.max_rows": asked.rows,
            "data.validation_fraction": 0.4,
            "data.train_fraction": 0.4,
            "data.test_rows": 16,
            "data.max_length": 160,
            "local.batch_size": 4,
            "rounds.count": asked.rounds,
            "evaluation.every": 0,
            "evaluation.rouge": False,
            "seed": seed,
        }
        found = measure(settings)
        with output.open("a", encoding="utf-8") as file:
            for client, shares in found.items():
                file.write(json.dumps({"seed": seed, "client": client, "shares": shares}) + "\n")
        print(seed, flush=True)


def measure(settings: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Client -> share -> figures."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        fedmira.run(method="local", settings=settings, output=run)
        saved = reload_adapters(run)
        clients = clients_of(saved)
        adapters = {client: saved.adapters[client] for client in saved.adapters}
        found: dict[str, dict[str, dict[str, float]]] = {client: {} for client in adapters}
        for share in SHARES:
            evaluation = saved.config.evaluation.model_copy(update={"reference_share": share})
            clients.references = references_of(saved.kind, evaluation)
            for client, adapter in adapters.items():
                found[client][str(share)] = figures(clients, client, adapter)
    return found


def figures(clients: LocalClients, client: str, adapter: Any) -> dict[str, float]:
    """Losses, exact match, and how fast answers come once the store is there."""
    own = {client: adapter}
    validation = clients.losses(own, "validation")[client].per_token
    test = clients.losses(own)[client].per_token
    began = time.perf_counter()
    (texts,) = clients.generations(own, 24).values()
    seconds = time.perf_counter() - began
    tokens = sum(len(clients.kind.base.tokenizer(text)["input_ids"]) for text in texts)
    scores = text_scores(texts, clients.data[client].references)
    return {
        "validation": validation,
        "test": test,
        "exact": scores["exact_match"],
        "tokens_a_second": tokens / seconds,
    }


def lines_of(path: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def summarise(lines: list[dict[str, Any]]) -> None:
    """Means over clients and seeds, and loss minus that without references, paired by seed."""
    print("| share | test loss | minus share 0 | exact match | minus share 0 | tokens a second |")
    print("|---|---|---|---|---|---|")
    for line in lines:
        shares = line["shares"]
        line["shares"]["chosen"] = min(shares.values(), key=lambda each: each["validation"])
    for share in (*map(str, SHARES), "chosen"):
        cells = []
        for figure, digits in (("test", 3), ("exact", 3)):
            values, gained = by_seed(lines, share, figure), []
            zero = by_seed(lines, "0.0", figure)
            gained = [values[seed] - zero[seed] for seed in values]
            mean = fmean(gained)
            half = STUDENT[len(gained)] * stdev(gained) / len(gained) ** 0.5
            cells += [
                f"{fmean(values.values()):.{digits}f}",
                f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]",
            ]
        speed = fmean(by_seed(lines, share, "tokens_a_second").values())
        print(f"| {share} | {' | '.join(cells)} | {speed:.0f} |")
    taken = [
        next(s for s in map(str, SHARES) if line["shares"][s] is line["shares"]["chosen"])
        for line in lines
    ]
    print({share: taken.count(share) for share in map(str, SHARES)})


def by_seed(lines: list[dict[str, Any]], share: str, figure: str) -> dict[int, float]:
    """Seed -> mean over clients."""
    seeds = dict.fromkeys(line["seed"] for line in lines)
    return {
        seed: fmean(line["shares"][share][figure] for line in lines if line["seed"] == seed)
        for seed in seeds
    }


if __name__ == "__main__":
    main()
