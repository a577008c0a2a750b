"""Tune MIRA on the validation rows of the Natural Instructions clients.

One setting is tuned after the other; test rows are read once, at the end.

    python experiments/natural_instructions/tune_mira.py --tasks TASKS --output runs/tune [--knobs
    graph,memory] [--set KEY=VALUE]

Each knob of `KNOBS` is tried with all others at the best so far, and keeps the option with the
lowest validation loss: the mean over clients and seeds of the last round, or, with --set
evaluation.select=best, of each client's best one. All options take equal local steps. pFedGraph's
are run as in its paper, which leaves no coupling and no size scale to tune. Then the settings that
were chosen, with and without the safeguard, and with the rank, layers and steps that were chosen
the defaults, the control (the chosen graph with its clients exchanged at random) and the methods of
--final-methods stand side by side, with validation and test losses, and as comparison.html in
OUTPUT/final/.

Runs are those of `fedmira compare`: finished ones are not repeated and interrupted ones continue,
so the same command may be given again. A seed changes the splits: rows that validate under one seed
may be test rows under another. So tune with one seed (--seeds), and read a final table with further
ones (--final-seeds) with that in mind.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from run_grid import COMMON

from fedmira.config import Config, load_config
from fedmira.errors import InputError, RunError
from fedmira.studies import compare_algorithms

LOCAL_STEPS = 30  # of every client at full participation
ANGLES = 'graph.measure="principal-angles"'
PFEDGRAPH = ["graph.kind=pfedgraph", "algorithm.server_step=1", "algorithm.size_scale=0"]
"""The paper's aggregation: its weights as they are. Under a coupling they would be rescaled."""
KNOBS: dict[str, dict[str, list[str]]] = {
    "graph": {
        "nearest-3": [],
        "nearest-2": ["graph.nearest=2"],
        "nearest-5": ["graph.nearest=5"],
        "nearest-8": ["graph.nearest=8"],
        "angles-3": [ANGLES],
        "angles-5": [ANGLES, "graph.nearest=5"],
        **{f"pfedgraph-{alpha}": [*PFEDGRAPH, f"graph.alpha={alpha}"] for alpha in (0.2, 0.4, 0.8)},
        "pfedgraph-angles-0.4": [*PFEDGRAPH, "graph.alpha=0.4", ANGLES],
    },
    "memory": {
        "memory-0.5": [],
        "memory-0": ["graph.memory=0"],
        "memory-0.8": ["graph.memory=0.8"],
    },
    "coupling": {
        "coupling-1": [],
        "coupling-0.5": ["algorithm.coupling=0.5"],
        "coupling-0.25": ["algorithm.coupling=0.25"],
    },
    "size": {
        "size-64": [],
        **{f"size-{scale}": [f"algorithm.size_scale={scale}"] for scale in (16, 256, 0)},
    },
    # alpha follows the rank, so that the scale of the branch stays 1
    "rank": {
        "rank-16": [],
        **{
            f"rank-{rank}": [f"adapter.rank={rank}", f"adapter.alpha={rank}"] for rank in (4, 8, 32)
        },
    },
    "layers": {
        "layers-qv": [],
        "layers-qkvo": ['adapter.targets=["q_proj", "k_proj", "v_proj", "o_proj"]'],
    },
    "steps": {
        "steps-5": [],
        "steps-2": ["local.steps=2"],
        "steps-3": ["local.steps=3"],
        "steps-10": ["local.steps=10"],
    },
}
"""Knob -> option -> overrides; the first option is the default."""
SETTLED = ("coupling", "size")
"""Knobs that pFedGraph's options settle."""

CAPACITY = ("rank", "layers", "steps")
"""Knobs that would serve any method."""

Chosen = dict[str, str]
"""Knob -> option."""


def name_of(chosen: Chosen) -> str:
    """What differs from the defaults."""
    parts = [
        option
        for knob, option in chosen.items()
        if option != next(iter(KNOBS[knob])) and knob != "steps"
    ]
    return "_".join(parts) or "default"


def settles(graph: str) -> bool:
    """Whether this option says how strong the step is."""
    return set(PFEDGRAPH) <= set(KNOBS["graph"][graph])


def settled(chosen: Chosen) -> Chosen:
    """The same, with the knobs that the graph settles at their defaults, which set nothing."""
    return {
        **chosen,
        **({knob: next(iter(KNOBS[knob])) for knob in SETTLED} if settles(chosen["graph"]) else {}),
    }


def overrides_of(chosen: Chosen, knobs: Iterable[str]) -> list[str]:
    """The settings of these knobs."""
    return [override for knob in knobs for override in KNOBS[knob][chosen[knob]]]


def ground_of(
    arguments: argparse.Namespace, chosen: Chosen, shared: Sequence[str] = ("steps",)
) -> Config:
    """The settings that all methods of one comparison share.

    Data, base, rounds, and those of the knobs `shared`.
    """
    common = [*COMMON, *overrides_of(chosen, shared)]
    rounds = LOCAL_STEPS // load_config(None, None, common).local.steps
    own = [
        f"data.path={arguments.tasks}",
        f"rounds.count={rounds}",
        f"evaluation.every={max(1, rounds // 3)}",
    ]
    return load_config(None, None, [*common, *own, *arguments.extra])


@contextmanager
def watch(name: str, rounds: int) -> Iterator[Callable[[str, Mapping[str, object]], None]]:
    begun = time.monotonic()
    yield lambda what, figures: None
    print(f"  {name}: {time.monotonic() - begun:.0f} s", flush=True)


def evaluations(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "evaluate"]


def finished(folder: Path) -> bool:
    document = folder / "run.json"
    return (
        document.is_file()
        and json.loads(document.read_text(encoding="utf-8"))["status"] == "finished"
    )


def validation_loss(folder: Path, select: str) -> float:
    """Mean over the clients with validation rows.

    Infinite where the run failed. Reads no test loss.
    """
    if not finished(folder):
        return math.inf
    losses: dict[object, list[float]] = {}
    for event in evaluations(folder):
        if event["validation_loss"] is not None:
            losses.setdefault(event["client"], []).append(float(str(event["validation_loss"])))
    if not losses:
        raise SystemExit(
            f"{folder}: no client has validation rows; set data.validation_fraction above 0"
        )
    return fmean(min(own) if select == "best" else own[-1] for own in losses.values())


def test_loss(folder: Path) -> float:
    """Mean test loss of the adapters that the clients were given."""
    index = (
        json.loads((folder / "adapters" / "index.json").read_text(encoding="utf-8"))
        if finished(folder)
        else {}
    )
    return (
        fmean(entry["metrics"]["after_align_loss"] for entry in index.values())
        if index
        else math.nan
    )


def run_all(
    arguments: argparse.Namespace,
    ground: Config,
    name: str,
    algorithms: Sequence[str],
    variants: Mapping[str, list[str]],
    seeds: list[int],
) -> dict[str, list[Path]]:
    """Method -> its run folders, by seed."""
    output = arguments.output / name
    try:
        compare_algorithms(ground, algorithms, seeds, output, watch, variants=variants)
    except RunError as error:  # a diverged option is not chosen
        print(f"  {error}", flush=True)
    return {
        name: [output / f"{name}-seed{seed}" for seed in seeds] for name in (*algorithms, *variants)
    }


def measured(arguments: argparse.Namespace, candidates: Mapping[str, Chosen]) -> dict[str, float]:
    """Validation loss of each candidate; those of equal local steps a round are one comparison."""
    losses = {}
    for steps in dict.fromkeys(chosen["steps"] for chosen in candidates.values()):
        alike = {
            option: chosen for option, chosen in candidates.items() if chosen["steps"] == steps
        }
        ground = ground_of(arguments, next(iter(alike.values())))
        variants = {
            name_of(chosen): overrides_of(chosen, [knob for knob in KNOBS if knob != "steps"])
            for chosen in alike.values()
        }
        runs = run_all(arguments, ground, steps, [], variants, arguments.seeds)
        for option, chosen in alike.items():
            losses[option] = fmean(
                validation_loss(run, ground.evaluation.select) for run in runs[name_of(chosen)]
            )
    return losses


def tuned(arguments: argparse.Namespace, knobs: Sequence[str]) -> Chosen:
    """The options with the lowest validation loss, one knob after the other."""
    chosen = {knob: next(iter(options)) for knob, options in KNOBS.items()}
    for knob in knobs:
        if knob in SETTLED and settles(chosen["graph"]):
            print(f"\n{knob}: settled by {chosen['graph']}", flush=True)
            continue
        print(f"\n{knob}, with {', '.join(chosen.values())}", flush=True)
        candidates = {option: settled({**chosen, knob: option}) for option in KNOBS[knob]}
        losses = measured(arguments, candidates)
        chosen = candidates[min(losses, key=lambda option: losses[option])]
        print(f"| {knob} | validation loss |\n|---|---|")
        for option, loss in losses.items():
            print(f"| {option}{' (chosen)' if option == chosen[knob] else ''} | {loss:.4f} |")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument(
        "--final-seeds", default="", help="seeds of the final table; those of --seeds when left out"
    )
    parser.add_argument("--final-methods", default="local,fedavg,fedit-finetune,ditto,fedalt")
    parser.add_argument("--knobs", default=",".join(KNOBS))
    parser.add_argument("--set", action="append", default=[], dest="extra")
    arguments = parser.parse_args()
    knobs = arguments.knobs.split(",")
    unknown = sorted(set(knobs) - set(KNOBS))
    if unknown:
        parser.error(f"unknown knob {unknown[0]!r}; they are {', '.join(KNOBS)}")
    arguments.seeds = [int(seed) for seed in arguments.seeds.split(",")]
    final_seeds = (
        [int(seed) for seed in arguments.final_seeds.split(",")]
        if arguments.final_seeds
        else arguments.seeds
    )

    chosen = tuned(arguments, knobs)
    # Capacity is no merit of alignment: local training and the defaults get the rank, layers and
    # steps that were chosen for MIRA.
    overrides = overrides_of(chosen, [knob for knob in KNOBS if knob not in CAPACITY])
    name = name_of(chosen) if overrides else "default"
    ground = ground_of(arguments, chosen, CAPACITY)
    variants = {
        "default": [],
        name: overrides,  # the same where only the capacity was changed
        f"{name}_safeguard": [*overrides, "algorithm.safeguard=true"],
        f"{name}_shuffled": [*overrides, "graph.shuffled=true"],
    }
    print(f"\nfinal, seeds {final_seeds}: {', '.join(chosen.values())}", flush=True)
    # In a folder of its own: what the tuning calls "default" there has the default rank and layers.
    runs = run_all(
        arguments, ground, "final", arguments.final_methods.split(","), variants, final_seeds
    )
    print(f"| {chosen['steps']} | validation loss | test loss |\n|---|---|---|")
    for method, folders in runs.items():
        validation = fmean(validation_loss(folder, ground.evaluation.select) for folder in folders)
        print(f"| {method} | {validation:.4f} | {fmean(map(test_loss, folders)):.4f} |")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from error
