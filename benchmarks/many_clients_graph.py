"""Seconds and memory of one server step of MIRA with many clients.

The adapters are shaped like those of the bundled base.

    python benchmarks/many_clients_graph.py --clients 10000 --trained 5000

Adapters lie on disk as in a run. Seconds are the processor time of one core; memory is what the
step adds to the process at its peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fedmira.config import GraphSettings
from fedmira.graphs import ExactProducts, SketchedProducts, graph_source
from fedmira.messages import Payload, Reply
from fedmira.methods import Combined, Method, MethodContext, Mira, ServerState
from fedmira.storage import AdapterStore, AdapterTable

RANK, ALPHA, LAYERS, INTO = 8, 16.0, 6, 192
MODULES = {"q_proj": 192, "v_proj": 64}


def draw(seed: int) -> dict[str, Tensor]:
    """Factors with normal entries."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for layer in range(LAYERS):
        for module, out in MODULES.items():
            adapter[f"layers.{layer}.{module}.lora_A.weight"] = 0.02 * torch.randn(
                RANK, INTO, generator=generator
            )
            adapter[f"layers.{layer}.{module}.lora_B.weight"] = 0.02 * torch.randn(
                out, RANK, generator=generator
            )
    return adapter


def replies(cohort: Iterable[int], round_number: int, groups: int) -> list[Reply]:
    """What clients send: a common start, the direction of their group and noise of their own."""
    common, result = draw(0), []
    for k in sorted(cohort):
        group, noise = draw(1 + k % groups), draw(1_000_000 * round_number + k)
        adapter = {
            name: start + 0.3 * noise[name] if ".lora_A." in name else group[name] + noise[name]
            for name, start in common.items()
        }
        result.append(Reply(f"client-{k}", round_number, 64, Payload({"adapter": adapter})))
    return result


def memory_mib(field: str) -> float:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measured(
    algorithm: Method, state: ServerState, sent: list[Reply]
) -> tuple[Combined, float, float]:
    """One step, its processor seconds and the MiB that it adds at its peak."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before, started = memory_mib("VmRSS"), time.process_time()
    combined = algorithm.combine(state, sent)
    return combined, time.process_time() - started, memory_mib("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument(
        "--trained",
        type=int,
        default=5_000,
        help="clients that have trained before the measured rounds",
    )
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sketch", type=lambda text: text if text == "auto" else int(text), default="auto"
    )
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    clients = tuple(f"client-{k}" for k in range(chosen.clients))
    source = graph_source(GraphSettings(sketch=chosen.sketch), clients, {}, 0)
    ranks = dict.fromkeys(clients, RANK)
    algorithm = Mira().for_federation(
        MethodContext(clients, dict.fromkeys(clients, 64), ranks, ALPHA, source, chosen.cohort)
    )
    groups = max(1, chosen.clients // 20)
    with tempfile.TemporaryDirectory() as folder:
        start = algorithm.initial_state(dict.fromkeys(clients, draw(0)))
        state = ServerState(
            AdapterTable.of(AdapterStore(Path(folder)), start.adapters), start.numbers
        )
        number = 0
        for first in range(0, chosen.trained, 500):
            number += 1
            state = algorithm.combine(
                state, replies(range(first, min(first + 500, chosen.trained)), number, groups)
            ).state
        seconds, mib = [], []
        for _ in range(chosen.rounds):
            number += 1
            cohort = torch.randperm(
                chosen.trained, generator=torch.Generator().manual_seed(number)
            )[: chosen.cohort].tolist()
            combined, spent, added = measured(algorithm, state, replies(cohort, number, groups))
            state = combined.state
            seconds.append(spent)
            mib.append(added)
        trained, started = state.numbers["last_round"] > 0, time.process_time()
        if source.sketch:
            SketchedProducts(state.numbers["travelled_sketch"]).likeness(trained, nearest=3)
        else:
            ExactProducts(state.numbers["product_gram"]).likeness(trained, nearest=3)
        similarity_seconds = time.process_time() - started
    edges = (
        combined.diagnostics.graph.pairs
        if combined.diagnostics.graph
        else torch.zeros(0, 2, dtype=torch.int64)
    )
    print(
        json.dumps(
            {
                "clients": chosen.clients,
                "trained": chosen.trained,
                "cohort": chosen.cohort,
                "sketch": source.sketch,
                "median_seconds": round(statistics.median(seconds), 3),
                "least_seconds": round(min(seconds), 3),
                "added_mib": round(max(mib), 1),
                "edges": len(edges),
                "edges_within_a_group": round(
                    float((edges % groups).diff(dim=1).eq(0).float().mean()), 4
                ),
                "seconds_for_similarity": round(similarity_seconds, 3),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
