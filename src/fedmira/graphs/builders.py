"""Fixed task graphs: random as the authors draw it, uniform, by category.

And the shuffled control.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedmira.errors import ConfigError
from fedmira.graphs.edges import joined, list_of_matrix
from fedmira.graphs.graph import Graph
from fedmira.seeds import text_seed

__all__ = [
    "MOST_EDGES",
    "all_pairs",
    "category_graph",
    "check_pairs",
    "permutation_without_fixed_points",
    "random_graph",
    "shuffled",
    "uniform_graph",
]

SPARSITY_LIMIT = 0.25
"""Edges of the authors' random graph below this are cut: one in eight."""
MOST_EDGES = 2_000_000
"""Most pairs that a graph is built for by rule.

2,000 clients that are all related have about as many.
"""


def _generator(seed: int, purpose: str) -> torch.Generator:
    """A random stream of its own for each purpose.

    So a shuffle is independent of the graph that it shuffles.
    """
    return torch.Generator().manual_seed(text_seed(seed, purpose))


def check_pairs(kind: str, clients: int, pairs: int) -> None:
    """Refuse a rule that relates too many pairs, before anything is built.

    Args:
        kind: of graph, for the error.
        clients: how many there are.
        pairs: how many the rule would relate.

    Raises:
        ConfigError: there are more than `MOST_EDGES`.
    """
    if pairs > MOST_EDGES:
        raise ConfigError(
            f"graph.kind = {kind!r}: its rule relates {pairs:,} pairs of {clients:,} "
            f"clients; at most {MOST_EDGES:,} can be held (set "
            "graph.kind to 'similarity', which keeps a few neighbours for each client, "
            "list the edges that matter in a 'file', or lower "
            "data.clients)"
        )


def all_pairs(count: int) -> int:
    """Pairs of `count` clients."""
    return count * (count - 1) // 2


def random_graph(clients: Sequence[str], seed: int) -> Graph:
    """The authors' recipe for a random graph.

    b ~ U(0, 1) in every cell, a = (b + b^T) / 2, and a = 0 where it is below 0.25.

    Args:
        clients: ids, in the order of the rows.
        seed: of the draw.

    Raises:
        ConfigError: there are too many pairs.
    """
    check_pairs("random", len(clients), all_pairs(len(clients)))
    draws = torch.rand(
        len(clients), len(clients), generator=_generator(seed, "random graph"), dtype=torch.float64
    )
    weights = (draws + draws.T) / 2
    weights[weights < SPARSITY_LIMIT] = 0
    return Graph("random", tuple(clients), list_of_matrix(weights))


def _joined_alike(kind: str, clients: Sequence[str], groups: Iterable[Tensor]) -> Graph:
    """Weight 1 between all clients of a group; groups are row numbers, int64 [n]."""
    pairs = torch.cat([torch.combinations(group, 2) for group in groups])
    return Graph(
        kind,
        tuple(clients),
        joined(pairs[:, 0], pairs[:, 1], torch.ones(len(pairs), dtype=torch.float64), len(clients)),
    )


def uniform_graph(clients: Sequence[str]) -> Graph:
    """Weight 1 between all pairs.

    Raises:
        ConfigError: there are too many pairs.
    """
    check_pairs("uniform", len(clients), all_pairs(len(clients)))
    return _joined_alike("uniform", clients, [torch.arange(len(clients))])


def category_graph(clients: Sequence[str], categories: Mapping[str, str]) -> Graph:
    """Weight 1 between clients of the same category, 0 otherwise.

    Args:
        clients: ids, in the order of the rows.
        categories: client id -> category.

    Raises:
        ConfigError: clients without a category, all of them together; or categories have too many
            pairs.
    """
    missing = [client for client in clients if not categories.get(client)]
    if missing:
        raise ConfigError(
            f"graph.kind = 'category': {len(missing)} of {len(clients)} clients have no "
            f"category, such as {missing[0]!r}; "
            "every client needs one (use data that names categories, or set graph.kind to "
            "'similarity')"
        )
    members: dict[str, list[int]] = {}
    for row, client in enumerate(clients):
        members.setdefault(categories[client], []).append(row)
    check_pairs("category", len(clients), sum(all_pairs(len(rows)) for rows in members.values()))
    return _joined_alike(
        "category", clients, [torch.tensor(rows, dtype=torch.int64) for rows in members.values()]
    )


def permutation_without_fixed_points(count: int, seed: int) -> Tensor:
    """A random cycle through all places, int64 [count].

    Nobody keeps a place when there are two or more (Sattolo 1986).

    Args:
        count: how many places.
        seed: of the draw.
    """
    generator = _generator(seed, "shuffled graph")
    places = list(range(count))
    for last in range(count - 1, 0, -1):
        other = int(torch.randint(last, (1,), generator=generator))
        places[last], places[other] = places[other], places[last]
    return torch.tensor(places, dtype=torch.int64)


def shuffled(graph: Graph, seed: int) -> Graph:
    """A control: the same graph with every client in another one's place.

    Degrees stay and relatedness is lost.

    Args:
        graph: stays as it is.
        seed: of the places.
    """
    # Client k takes the weights of client places[k], so those of client places[k] move to k.
    places = permutation_without_fixed_points(len(graph.clients), seed)
    return replace(graph.moved(torch.argsort(places)), kind=f"{graph.kind}-shuffled")
