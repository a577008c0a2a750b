"""Times the rounds of one run with one process and with several, side by side.

    python benchmarks/workers.py --output benchmarks/results/workers.json
    python benchmarks/workers.py --clients 16 --steps 5 --passes 5 --workers 2 --busy

Each pass trains the same clients once in every way, in turn: one process of one thread, one
process of as many threads as there are workers, and the workers of one thread each. Workers begin
before the first pass; how long that takes stands apart. The adapters of all ways are compared bit
for bit. With `--busy` another process keeps one core busy meanwhile.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedmira import load_config
from fedmira.clients import Crew, InTurn, LocalClients, Workers
from fedmira.experiment import Experiment, build_experiment
from fedmira.messages import Reply, Request
from fedmira.seeds import seed_for
from machine import provenance
from watched_run import write_clients

__all__ = ["main"]


def built(clients: int, steps: int, place: Path) -> Experiment:
    """Federated averaging of made-up clients on the bundled base."""
    rows = write_clients(place / "clients.jsonl", clients)
    return build_experiment(
        load_config(
            overrides=[
                "algorithm.name=fedavg",
                "data.source=jsonl",
                f"data.path={rows}",
                "data.max_length=96",
                "data.train_fraction=0.67",
                "data.test_rows=1",
                f"local.steps={steps}",
                "local.batch_size=8",
                "adapter.rank=16",
                "engine.workers=1",
                "engine.threads=1",
            ]
        )
    )


def trained(experiment: Experiment, crew: Crew) -> tuple[float, dict[str, Reply]]:
    """Seconds of a round of all clients, and the replies."""
    assert isinstance(experiment.clients, LocalClients)
    clients = replace(experiment.clients, crew=crew)
    state = experiment.algorithm.initial_state(experiment.starts)
    requests = [
        Request(
            name,
            1,
            seed_for(0, "train", 1, name),
            experiment.algorithm.instruct(state, name),
        )
        for name in sorted(experiment.parties)
    ]
    begun = time.perf_counter()
    answers = clients.train(requests)
    spent = time.perf_counter() - begun
    replies = {answer.client_id: answer for answer in answers if isinstance(answer, Reply)}
    assert len(replies) == len(requests), "a client failed"
    return spent, replies


def same(one: dict[str, Reply], other: dict[str, Reply]) -> bool:
    """Whether all adapters are equal bit for bit."""
    return all(
        torch.equal(tensor, other[client].payload.tensors[group][name])
        for client, reply in one.items()
        for group, tensors in reply.payload.tensors.items()
        for name, tensor in tensors.items()
    )


def neighbour() -> None:
    """Keeps a core busy."""
    while True:
        pass


def measured(given: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Seconds of each way in each pass, medians, and ratios to one thread."""
    experiment = built(given.clients, given.steps, place)
    assert isinstance(experiment.clients, LocalClients)
    many = Workers(given.workers)
    begun = time.perf_counter()
    trained(experiment, many)
    first = time.perf_counter() - begun
    ways: dict[str, Crew] = {
        "one process, one thread": InTurn(1),
        f"one process, {given.workers} threads": InTurn(given.workers),
        f"{given.workers} workers, one thread each": many,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    replies: dict[str, dict[str, Reply]] = {}
    for _ in range(given.passes):
        for name, crew in ways.items():
            spent, replies[name] = trained(experiment, crew)
            seconds[name].append(spent)
    many.release()
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    reference, *_ = ways
    return {
        "clients": given.clients,
        "clients_of_a_share": experiment.clients.at_once,
        "token_budget": experiment.token_budget,
        "busy_neighbour": given.busy,
        "seconds": seconds,
        "medians": medians,
        "times_as_fast_as_one_thread": {
            name: medians[reference] / median for name, median in medians.items()
        },
        "first_round_with_workers_seconds": first,
        "adapters_equal_to_one_thread": {
            name: same(replies[reference], replies[name]) for name in ways
        },
    }


def main() -> None:
    """Measure, and write or print the JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--busy", action="store_true", help="beside a process that needs a core")
    parser.add_argument("--output", type=Path, help="a JSON file; printed where it is not given")
    given = parser.parse_args()
    other = multiprocessing.get_context("spawn").Process(target=neighbour, daemon=True)
    if given.busy:
        other.start()
    with tempfile.TemporaryDirectory() as place:
        document = {**measured(given, Path(place)), **provenance()}
    text = json.dumps(document, indent=1) + "\n"
    if given.output:
        given.output.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
