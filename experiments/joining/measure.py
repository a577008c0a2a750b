"""What joining a finished run is worth to tasks that were not in it, by rows and by start.

    python experiments/joining/measure.py TASKS RUN OUTPUT.jsonl [--skip 24] [--last 12]
        [--rows 4 8 16 32] [--steps 10] [--draws 0]
    python experiments/joining/measure.py --summary OUTPUT.jsonl

RUN is a run folder whose clients were the first tasks of TASKS; the last ones join it one by one.
Each line of OUTPUT is a task, a draw of its rows and a number of them: test losses of the base, of
every start and of what equal local steps make of it, and which start `fedmira join` takes. A line
that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, quantiles

from fedmira.data import load_newcomer, read_rows, rows_from_objects
from fedmira.fleet import RULES, Joining, JoinSettings, Pool, Trial, best_way
from fedmira.metrics import Standing, judge
from fedmira.studies.joining import pool_of
from fedmira.studies.saved import SavedAdapters, quick_budget, reload_adapters

DRAWS = 4000


def main() -> None:
    """Measures, or summarises what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("places", type=Path, nargs="+")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--last", type=int, default=12)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--draws", type=int, nargs="+", default=[0])
    asked = parser.parse_args()
    if asked.summary:
        summarise(lines_of(asked.places[0]))
        return
    tasks, run, output = asked.places
    saved = reload_adapters(run)
    pool, _ = pool_of(saved, "newcomer")
    done = {(line["draw"], line["task"], line["rows"]) for line in lines_of(output)}
    for draw in asked.draws:
        changes = {"path": str(tasks), "clients": 0, "max_rows": 0}
        read = read_rows(saved.config.data.model_copy(update=changes), draw)
        pairs = list(zip(read.clients, read.splits, strict=True))
        unseen = [pair for pair in pairs if pair[0].client_id not in saved.adapters]
        for client, split in reversed(unseen[-asked.last :]):
            for count in asked.rows:
                if (draw, client.client_id, count) in done:
                    continue
                line = measure(saved, pool, client.client_id, split, count, asked.steps)
                line = {"draw": draw, **line}
                with output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(draw, client.client_id, count, line["taken"], flush=True)


def measure(
    saved: SavedAdapters, pool: Pool, task: str, split: object, count: int, steps: int
) -> dict[str, object]:
    """All starts of one newcomer, trained by the same draws, on its test rows."""
    rows = {"train": told(split.train[:count]), "test": told(split.test)}
    settings = saved.config.data.model_copy(update={"source": "object", "sha256": None})
    newcomer = load_newcomer(
        settings,
        saved.config.seed,
        saved.kind.base.tokenizer,
        task,
        rows_from_objects({task: rows}),
    )
    training = JoinSettings(saved.config.local, steps, saved.config.seed, quick_budget(saved))
    joining = Joining(newcomer, pool, saved.kind, training)
    trials = joining.trials()
    scores = joining.scores()
    weights = {rule: pool.weights(rule, scores) for rule in RULES}
    starts = {rule: pool.start(of) for rule, of in weights.items()}
    ended = joining.trained(starts).adapters
    judged = judge({trial.rule: trial.losses for trial in trials}, joining.tokens, "fresh")
    before, after = (
        {rule: loss.per_token for rule, loss in joining.tested(of).items()}
        for of in (starts, ended)
    )
    return {
        "task": task,
        "rows": count,
        "steps": steps,
        "start": before,
        "trained": after,
        "taken": min(trials, key=lambda trial: trial.trained).rule,
        "sure": judged.choice if judged.standing is Standing.better else "fresh",
        "trials": {trial.rule: [trial.start, trial.trained] for trial in trials},
        "folds": {trial.rule: [trial.start_losses, trial.losses] for trial in trials},
        "tokens": joining.tokens,
        "weights": weights,
    }


def told(rows: Sequence[object]) -> list[dict[str, str]]:
    """Examples as rows of a user."""
    return [
        {"instruction": row.instruction, "input": row.input, "output": row.output} for row in rows
    ]


def lines_of(path: Path) -> list[dict]:
    """What was measured."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summarise(lines: Sequence[dict]) -> None:
    """Means over tasks for each number of rows, and paired differences to a fresh start."""
    for count in sorted({line["rows"] for line in lines}):
        of = [line for line in lines if line["rows"] == count]
        ways = {
            "base": lambda line: line["start"]["fresh"],
            **{f"start {rule}": lambda line, rule=rule: line["start"][rule] for rule in RULES},
            **{f"trained {rule}": lambda line, rule=rule: line["trained"][rule] for rule in RULES},
            "join": joined,
            "join, always trained": lambda line: line["trained"][line["taken"]],
            "join, only where sure": lambda line: line["trained"][line["sure"]],
            "best way in hindsight": lambda line: min(line["trained"].values()),
        }
        print(f"\n{count} rows, {len(of)} lines, {len({line['task'] for line in of})} tasks")
        print(Counter(way_of(line) for line in of))
        for name, way in ways.items():
            told = [by_task(of, way)]
            for rival in ("fresh", "nearest", "generalist"):
                if name.startswith(("join", "trained", "best")):
                    told.append(
                        by_task(of, lambda line, way=way, to=rival: way(line) - line["trained"][to])
                    )
            mean, *differences = (list(each.values()) for each in told)
            print(f"{name:24s} {fmean(mean):.4f}", *(interval(each) for each in differences))


def way_of(line: dict) -> tuple[str, bool]:
    """The way that `fedmira join` takes, and whether it trains."""
    trials = [
        Trial(rule, *line["trials"][rule], *map(tuple, line["folds"][rule]))
        for rule in line["trials"]
    ]
    return best_way(trials, line["tokens"])


def joined(line: dict) -> float:
    """The test loss of what `fedmira join` gives."""
    rule, train = way_of(line)
    return line["trained" if train else "start"][rule]


def by_task(lines: Sequence[dict], value) -> dict[str, float]:
    """Task -> the mean over its draws."""
    tasks = {line["task"] for line in lines}
    return {
        task: fmean(value(line) for line in lines if line["task"] == task) for task in sorted(tasks)
    }


def interval(differences: Sequence[float]) -> str:
    """The mean, its bootstrap interval over tasks, and how many are below and above 0."""
    draw = random.Random(1)
    drawn = [fmean(draw.choices(differences, k=len(differences))) for _ in range(DRAWS)]
    low, high = quantiles(drawn, n=40)[0], quantiles(drawn, n=40)[-1]
    below, above = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    return f"| {fmean(differences):+.3f} [{low:+.3f}, {high:+.3f}] {below}/{above}"


if __name__ == "__main__":
    main()
