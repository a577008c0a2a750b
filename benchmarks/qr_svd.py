"""The mean of clients' updates cut to a rank.

QR-SVD on the stacked factors against the SVD of the full matrix.

    python benchmarks/qr_svd.py --output benchmarks/results/qr-svd.json
    python benchmarks/qr_svd.py --size small

One module of out x in with several clients, as FlexLoRA and MIRA in product space compute it
(`fedmira.adapters.mix`, float64). The dense way forms the mean out x in matrix and decomposes it,
in float64 as well and in float32 as FlexLoRA's code does. The two are timed in turn, so that a slow
minute meets both; `ratio` is the median over the passes of dense over factors. `error` is the
largest entry of the difference to the dense float64 product beside that product's largest entry.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fedmira.adapters import (
    Adapter,
    mix,
    modules,
    scale,
)
from machine import provenance

__all__ = ["main"]

ALPHA = 16.0
SIZES = {
    "small": [(256, 256, 8, 16)],
    "full": [(2048, 2048, 8, 16), (2048, 5504, 8, 16), (2048, 2048, 80, 16), (2048, 2048, 8, 4)],
}
"""Cases as (out, in, clients, rank)."""


def draw(out: int, into: int, rank: int, seed: int) -> dict[str, Tensor]:
    """One client's factors of one module, float32, with entries like those of a trained adapter."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, into, generator=generator) / into**0.5
    return {
        "m.lora_A.weight": down,
        "m.lora_B.weight": 0.02 * torch.randn(out, rank, generator=generator),
    }


def by_factors(adapters: list[dict[str, Tensor]], rank: int) -> Adapter:
    """The project's way."""
    strengths = [scale(ALPHA, rank)] * len(adapters)
    weights = [1 / len(adapters)] * len(adapters)
    return mix(
        adapters, weights, strengths, rank, scale(ALPHA, rank), adapters[0], split="flex"
    ).adapter


def by_dense(adapters: list[dict[str, Tensor]], rank: int, dtype: torch.dtype) -> Adapter:
    """The mean matrix, its decomposition, and the strongest directions of it."""
    strength = scale(ALPHA, rank)
    pairs = [modules(adapter)["m"] for adapter in adapters]
    mean = sum(
        (strength / len(pairs) * (up.to(dtype) @ down.to(dtype)) for down, up in pairs),
        torch.zeros((), dtype=dtype),
    )
    left, values, right = torch.linalg.svd(mean, full_matrices=False)
    up = left[:, :rank] * values[:rank] / strength
    return {"m.lora_A.weight": right[:rank].float(), "m.lora_B.weight": up.float()}


def product(adapter: Adapter, rank: int) -> Tensor:
    """alpha / r B A, float64."""
    down, up = modules(adapter)["m"]
    return scale(ALPHA, rank) * up.double() @ down.double()


def seconds(work: Callable[[], Adapter]) -> tuple[float, Adapter]:
    """Wall time of one call, and its result."""
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def measure(out: int, into: int, clients: int, rank: int, repeats: int) -> dict[str, object]:
    """Time all ways in turn, after one call of each that is not counted."""
    adapters = [draw(out, into, rank, seed) for seed in range(clients)]
    ways: dict[str, Callable[[], Adapter]] = {
        "factors": lambda: by_factors(adapters, rank),
        "dense_float64": lambda: by_dense(adapters, rank, torch.float64),
        "dense_float32": lambda: by_dense(adapters, rank, torch.float32),
    }
    results = {name: seconds(work)[1] for name, work in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            times[name].append(seconds(work)[0])
    expected = product(results["dense_float64"], rank)
    found: dict[str, object] = {
        "out": out,
        "in": into,
        "clients": clients,
        "rank": rank,
        "seconds": times,
    }
    for name in ("dense_float64", "dense_float32"):
        found[f"ratio_{name}"] = statistics.median(
            dense / own for dense, own in zip(times[name], times["factors"], strict=True)
        )
    for name in ("factors", "dense_float32"):
        found[f"error_{name}"] = float(
            (product(results[name], rank) - expected).abs().max() / expected.abs().max()
        )
    return found


def main() -> None:
    """Run, and write or print the JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a JSON file; printed where it is not given")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    settings = {
        "size": given.size,
        "repeats": given.repeats,
        "threads": given.threads,
        "alpha": ALPHA,
    }
    cases = [measure(*case, given.repeats) for case in SIZES[given.size]]
    document = json.dumps({**provenance(), "settings": settings, "cases": cases}, indent=1)
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(document + "\n", encoding="utf-8")
    else:
        print(document)


if __name__ == "__main__":
    main()
