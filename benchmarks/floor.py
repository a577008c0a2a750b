"""The floor of a round's time: the operations it needs at least over this machine's best rate.

Operations are floating-point, and the rate is that at which the machine multiplies matrices.

    python benchmarks/floor.py WORKLOAD OUT --rounds 3 --threads 2

Operations of a token in training: 2 N forward and 2 N back through the N frozen weights of the
linear layers, except where nothing below needs a gradient (query, key and value of the first
layer); 6 for each weight of the factors; 12 for each pair of tokens that attend to each other, head
and channel (4 forward, 8 back); 4 for each weight of the head, at places that predict a response
token only. The last response token is never read. Element-wise work counts nothing, so no program
can reach the floor.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.workbench import Work, parse_arguments, read_work

__all__ = ["Shape", "count_round", "matmul_rate"]


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama and its adapter that cost anything."""

    linear: tuple[tuple[int, int], ...]  # (outputs, inputs) of each linear layer of a block
    layers: int
    channels: int  # of all attention heads together
    head: int
    first_block_saved: int
    factors: int

    @classmethod
    def of(cls, work: Work) -> Shape:
        """From the workload's base and settings."""
        config = json.loads((work.folder / "base" / "config.json").read_text(encoding="utf-8"))
        hidden, inner, heads = (
            config["hidden_size"],
            config["intermediate_size"],
            config["num_attention_heads"],
        )
        queries = heads * (config.get("head_dim") or hidden // heads)
        keys = queries // heads * config["num_key_value_heads"]
        linear = {
            "q": (queries, hidden),
            "k": (keys, hidden),
            "v": (keys, hidden),
            "o": (hidden, queries),
        }
        adapted = {"q_proj": queries, "v_proj": keys}
        return cls(
            (*linear.values(), (inner, hidden), (inner, hidden), (hidden, inner)),
            config["num_hidden_layers"],
            queries,
            hidden * config["vocab_size"],
            sum(rows * columns for rows, columns in (linear["q"], linear["k"], linear["v"])),
            sum(
                work.settings["rank"] * (hidden + adapted[name])
                for name in work.settings["targets"]
            )
            * config["num_hidden_layers"],
        )

    def operations(self, tokens: int, pairs: int, predicted: int) -> float:
        """Of one forward and backward pass."""
        frozen = sum(rows * columns for rows, columns in self.linear) * self.layers
        per_token = 4 * frozen - 2 * self.first_block_saved + 6 * self.factors
        return (
            tokens * per_token
            + 12 * self.channels * self.layers * pairs
            + 4 * self.head * predicted
        )


def count_round(work: Work, number: int, shape: Shape) -> dict[str, float]:
    """Operations of a round, counted in two ways.

    Once with every real token, and once with the prefix that a batch shares counted once.
    """
    from fedmira.data import EncodedExample
    from fedmira.model.packed.packing import common_prefix

    every = shared = 0.0
    for part in work.rounds[number]:
        for batch in work.batches(part):
            lengths = [len(prompt) + len(response) - 1 for prompt, response in batch]
            predicted = sum(len(response) for _, response in batch)
            every += shape.operations(
                sum(lengths), sum(_triangle(length) for length in lengths), predicted
            )
            prefix = common_prefix(
                [EncodedExample(tuple(prompt), tuple(response)) for prompt, response in batch]
            )
            rests = [length - prefix for length in lengths]
            pairs = _triangle(prefix) + sum(rest * prefix + _triangle(rest) for rest in rests)
            shared += shape.operations(prefix + sum(rests), pairs, predicted)
    return {"every_token": every, "shared_once": shared}


def matmul_rate(shape: Shape, dtype: str) -> float:
    """Operations per second of the block's frozen multiplications, forward and back.

    The best of several numbers of tokens.
    """
    import torch

    kind = getattr(torch, dtype)
    weights = [torch.randn(rows, columns).to(kind) for rows, columns in shape.linear]
    best = 0.0
    for tokens in (256, 1024, 4096):
        inputs = [torch.randn(tokens, weight.shape[1]).to(kind) for weight in weights]
        outputs = [torch.randn(tokens, weight.shape[0]).to(kind) for weight in weights]

        def block(inputs: list[Any] = inputs, outputs: list[Any] = outputs) -> None:
            for weight, given, gradient in zip(weights, inputs, outputs, strict=True):
                torch.nn.functional.linear(given, weight)
                gradient @ weight

        best = max(
            best, tokens * 4 * sum(weight.numel() for weight in weights) / _median_seconds(block)
        )
    return best


def _median_seconds(work: Callable[[], None]) -> float:
    seconds: list[float] = []
    work()
    while sum(seconds) < 1.0 or len(seconds) < 5:
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def main() -> None:
    arguments = parse_arguments()
    import torch

    torch.set_num_threads(arguments.threads)
    work = read_work(arguments.workload)
    shape = Shape.of(work)
    result = {
        "operations_per_second": matmul_rate(shape, arguments.dtype),
        "operations_per_round": [
            count_round(work, number, shape) for number in range(arguments.rounds)
        ],
    }
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
