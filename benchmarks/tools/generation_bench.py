"""What both generation tools share.

Every client's own adapter, the clock, and the result with all texts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Sequence

from workbench import Adapter, Work, parse_arguments, read_work

__all__ = ["NEW_TOKENS", "run"]

NEW_TOKENS = 32


def client_adapters(work: Work) -> list[Adapter]:
    """The start with another random B for each client, so that each answers in its own way."""
    import torch

    start = work.start()
    adapters = []
    for client in range(len(work.names)):
        generator = torch.Generator().manual_seed(client)
        adapters.append(
            {
                name: torch.randn(tensor.shape, generator=generator) * 0.05
                if "lora_B" in name
                else tensor
                for name, tensor in start.items()
            }
        )
    return adapters


def run(
    imports: Sequence[str],
    load: Callable[[Work, list[Adapter], argparse.Namespace], Callable[[], list[list[str]]]],
) -> None:
    """Import, load, generate pass after pass by the clock, write seconds and texts.

    Args:
        load: makes the base ready; returns what continues all prompts of all clients.
    """
    arguments = parse_arguments()
    for name in ("torch", *imports):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(arguments.threads)
    work = read_work(arguments.workload)
    generate = load(work, client_adapters(work), arguments)
    seconds, texts = [], []
    for _ in range(arguments.rounds):
        begin = time.perf_counter()
        texts = generate()
        seconds.append(time.perf_counter() - begin)
    prompts = sum(map(len, work.prompts))
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {
        "seconds_per_round": seconds,
        "prompts": prompts,
        "new_tokens": prompts * NEW_TOKENS,
        "texts": texts,
    }
    (arguments.out / "result.json").write_text(json.dumps(result), encoding="utf-8")
