"""What the tool scripts share.

Arguments, the workload, padded batches, FedAvg, the clock, and the result that each writes.

    python benchmarks/tools/TOOL.py WORKLOAD OUT --rounds 3 --threads 2

Into the folder OUT go result.json and adapter.safetensors, the averaged adapter after the last
round.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Adapter",
    "ClientRound",
    "Work",
    "average",
    "padded_batch",
    "parse_arguments",
    "per_client",
    "read_work",
    "run",
    "write_result",
]

Adapter = dict[str, Any]
Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class ClientRound:
    """What a client does in a round: one list of row numbers for each local step."""

    client: int
    seed: int
    batches: list[list[int]]


@dataclass(frozen=True)
class Work:
    """A workload folder as it is read back."""

    folder: Path
    settings: dict[str, Any]
    names: list[str]
    rows: list[list[Row]]
    prompts: list[list[list[int]]]
    rounds: list[list[ClientRound]]

    @property
    def base(self) -> str:
        """The folder of the frozen base."""
        return str(self.folder / "base")

    def batches(self, part: ClientRound) -> list[list[Row]]:
        """The rows of each local step."""
        return [[self.rows[part.client][index] for index in batch] for batch in part.batches]

    def start(self) -> Adapter:
        """The adapter before round 1."""
        from safetensors.torch import load_file

        return load_file(self.folder / "start.safetensors")


TrainClient = Callable[[Adapter, ClientRound], tuple[Adapter, float | None]]
"""(start adapter, what to train on) -> the client's adapter and its loss.

The loss is in nats per response token, where the tool tells it.
"""

TrainRound = Callable[[Adapter, list[ClientRound]], tuple[Adapter, float | None]]
"""(shared adapter, the round's clients) -> the next shared adapter and the mean loss."""


def run(imports: Sequence[str], load: Callable[[Work, argparse.Namespace], TrainRound]) -> None:
    """Import, load, train round after round by the clock, write the result.

    Args:
        imports: modules that the tool works with; their import is timed on its own.
        load: makes the base ready and returns what trains a round.
    """
    arguments = parse_arguments()
    begin = time.perf_counter()
    for name in ("torch", *imports):
        importlib.import_module(name)
    imported = time.perf_counter()
    import torch

    torch.set_num_threads(arguments.threads)
    work = read_work(arguments.workload)
    adapter = work.start()
    train_round = load(work, arguments)
    ends = [time.perf_counter()]
    losses = []
    for parts in work.rounds[: arguments.rounds]:
        adapter, loss = train_round(adapter, parts)
        losses.append(loss)
        ends.append(time.perf_counter())
    startup = {"import_seconds": imported - begin, "load_seconds": ends[0] - imported}
    write_result(arguments, work, adapter, ends, {**startup, "losses": losses})


def parse_arguments() -> argparse.Namespace:
    """Workload, output folder, rounds, threads, dtype."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen base"
    )
    return parser.parse_args()


def read_work(folder: Path) -> Work:
    """Read what `workload.py` wrote."""
    content = json.loads((folder / "workload.json").read_text(encoding="utf-8"))
    clients = content["clients"]
    return Work(
        folder,
        content["settings"],
        [client["id"] for client in clients],
        [[(prompt, response) for prompt, response in client["train"]] for client in clients],
        [client["prompts"] for client in clients],
        [[ClientRound(**part) for part in parts] for parts in content["rounds"]],
    )


def per_client(work: Work, train_client: TrainClient) -> TrainRound:
    """Clients one after another, then FedAvg."""

    def train_round(adapter: Adapter, parts: list[ClientRound]) -> tuple[Adapter, float | None]:
        adapters, losses = zip(*(train_client(adapter, part) for part in parts), strict=True)
        known = [loss for loss in losses if loss is not None]
        return average(adapters, [len(work.rows[part.client]) for part in parts]), sum(known) / len(
            known
        ) if known else None

    return train_round


def average(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The weighted mean of the factors, summed in float64."""
    total = sum(weights)
    return {
        name: sum(
            adapter[name].double() * (weight / total)
            for adapter, weight in zip(adapters, weights, strict=True)
        ).float()
        for name in adapters[0]
    }


def padded_batch(rows: Sequence[Row], padding: int = 0) -> dict[str, Any]:
    """Rows padded on the right, as input_ids, attention_mask and labels.

    Labels are -100 wherever no response token stands.
    """
    import torch

    size = max(len(prompt) + len(response) for prompt, response in rows)
    ids, mask, labels = [], [], []
    for prompt, response in rows:
        rest = size - len(prompt) - len(response)
        ids.append([*prompt, *response, *[padding] * rest])
        mask.append([1] * (size - rest) + [0] * rest)
        labels.append([-100] * len(prompt) + response + [-100] * rest)
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


def write_result(
    arguments: argparse.Namespace,
    work: Work,
    adapter: Adapter,
    ends: Sequence[float],
    extra: dict[str, Any],
) -> None:
    """Write the averaged adapter and the figures.

    Args:
        ends: `time.perf_counter()` before the first and after each round.
        extra: further figures, such as the seconds of start-up.
    """
    from safetensors.torch import save_file

    now, tick = time.time(), time.perf_counter()
    started = float(
        os.environ.get("BENCHMARK_STARTED", "nan")
    )  # run.py's clock just before it started this process
    rounds = work.rounds[: arguments.rounds]
    rows = [
        [row for part in parts for batch in work.batches(part) for row in batch] for parts in rounds
    ]
    result = {
        "seconds_per_round": [end - begin for begin, end in zip(ends, ends[1:], strict=False)],
        "until_first_round_seconds": now - (tick - ends[1]) - started,
        "steps_per_round": [sum(len(part.batches) for part in parts) for parts in rounds],
        "response_tokens_per_round": [sum(len(response) for _, response in part) for part in rows],
        "tokens_per_round": [
            sum(len(prompt) + len(response) for prompt, response in part) for part in rows
        ],
        **extra,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in sorted(adapter.items())},
        arguments.out / "adapter.safetensors",
    )
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
