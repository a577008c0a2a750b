"""Federations of LoRA adapters without any model.

Contexts, random adapters, dense updates, and clients with quadratic losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedmira.adapters import (
    Adapter,
    map_tensors,
    modules,
    truncate_rank,
)
from fedmira.graphs import FixedGraph, GraphSource, uniform_graph
from fedmira.messages import Payload, Reply
from fedmira.methods import Method, MethodContext, ServerState, Start, Trained

__all__ = [
    "SMALL",
    "best_of_rank",
    "context",
    "dense",
    "descend",
    "lora",
    "names",
    "play",
    "replies",
    "start",
    "started",
]

ALPHA = 16.0
SMALL: Mapping[str, tuple[int, int]] = {"q_proj": (14, 12), "v_proj": (10, 12)}
"""Module -> (out, in)."""


def names(count: int) -> tuple[str, ...]:
    return tuple(f"client-{k}" for k in range(count))


def lora(rank: int, seed: int, shapes: Mapping[str, tuple[int, int]] = SMALL) -> dict[str, Tensor]:
    """Random factors."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, (out, into) in shapes.items():
        adapter[f"m.{name}.lora_A.weight"] = torch.randn(rank, into, generator=generator)
        adapter[f"m.{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    return adapter


def start(rank: int, shapes: Mapping[str, tuple[int, int]] = SMALL) -> dict[str, Tensor]:
    """The common start at the largest rank: B is zero."""
    return {
        name: torch.zeros_like(tensor) if ".lora_B." in name else tensor
        for name, tensor in lora(rank, 0, shapes).items()
    }


def context(
    ranks: Sequence[int],
    rows: Sequence[int] | None = None,
    graph: GraphSource | None = None,
    rounds: int = 4,
) -> MethodContext:
    clients = names(len(ranks))
    return MethodContext(
        clients=clients,
        rows=dict(zip(clients, rows or [20] * len(ranks), strict=True)),
        ranks=dict(zip(clients, ranks, strict=True)),
        alpha=ALPHA,
        graph=graph or FixedGraph(uniform_graph(clients)),
        cohort=len(ranks),
        rounds=rounds,
    )


def started(
    algorithm: Method,
    federation: MethodContext,
    shapes: Mapping[str, tuple[int, int]] = SMALL,
) -> ServerState:
    common = start(max(federation.ranks.values()), shapes)
    return algorithm.initial_state(
        {client: truncate_rank(common, federation.ranks[client]) for client in federation.clients}
    )


def replies(
    federation: MethodContext, adapters: Mapping[str, Adapter], round_number: int = 1
) -> list[Reply]:
    return [
        Reply(client, round_number, federation.rows[client], Payload({"adapter": adapter}))
        for client, adapter in adapters.items()
    ]


def dense(adapter: Adapter, factor: float = 1.0) -> dict[str, Tensor]:
    """module -> factor * B A, float64."""
    return {
        name: factor * up.double() @ down.double() for name, (down, up) in modules(adapter).items()
    }


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def descend(begun: Start, centre: Adapter, steps: int, rate: float) -> Adapter:
    """Gradient descent on 1/2 |w - centre|^2 from where a client begins, with its hooks."""
    present = dict(begun.adapter)
    for _ in range(steps):
        gradient: Adapter = map_tensors(torch.sub, present, centre)
        if begun.hook is not None:
            gradient = begun.hook(gradient, present)
        present = map_tensors(lambda tensor, slope: tensor - rate * slope, present, gradient)
        if begun.settle is not None:
            present |= begun.settle(present)
    return present


def play(
    algorithm: Method,
    federation: MethodContext,
    state: ServerState,
    centres: Mapping[str, Adapter],
    round_number: int,
    steps: int = 3,
    rate: float = 0.25,
) -> tuple[ServerState, list[Reply]]:
    """One round of the clients in `centres`, both halves.

    The state after it, and what they sent.
    """
    sent = []
    for client, centre in centres.items():
        payload = algorithm.instruct(state, client)
        begun = algorithm.begin(payload, None)
        trained = descend(begun, centre, steps, rate)
        learned = begun.learned() if begun.learned else {}
        answer, _ = algorithm.finish(
            payload, None, Trained(trained, federation.rows[client], steps, rate, learned=learned)
        )
        sent.append(
            replace(replies(federation, {client: trained}, round_number)[0], payload=answer)
        )
    return algorithm.combine(state, sent).state, sent
