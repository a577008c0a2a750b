"""Where an algorithm gets its graph from, round by round: a fixed graph, or one that is learned from the updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fedmira.config.schema import GraphSettings
from fedmira.errors import ConfigError
from fedmira.graphs.builders import category_graph, file_graph, random_graph, shuffled, uniform_graph
from fedmira.graphs.edges import NO_EDGES
from fedmira.graphs.graph import Graph
from fedmira.graphs.products import InnerProducts
from fedmira.graphs.similarity import SMALLEST_SHARE, remember

__all__ = ["FixedGraph", "GraphSource", "LearnedGraph", "graph_source", "sketch_entries"]

MOST_EXACT = 512
"""Most clients whose inner products are kept one by one when the config leaves it open."""
DEFAULT_ENTRIES = 1024
"""Entries of a sketch, 4 KiB, when the config leaves it open: cosines are off by about 0.03."""


class GraphSource(Protocol):
    """A graph that may change from round to round; what it remembers is an edge list that the algorithm's state keeps."""

    @property
    def learned(self) -> bool:
        """Whether the graph changes with the updates, so that its memory belongs into the checkpoint."""
        ...

    @property
    def sketch(self) -> int:
        """Entries of the sketches from which inner products between updates are estimated; 0 where they are exact."""
        ...

    def initial(self, clients: Sequence[str]) -> Tensor:
        """The memory before round 1: an edge list, float64 [E, 3], of rows in the order of the clients."""
        ...

    def update(self, memory: Tensor, products: InnerProducts, trained: Tensor) -> Tensor:
        """The memory after a round.

        Args:
            memory: edge list, float64 [E, 3].
            products: product-space inner products of the updates of all clients.
            trained: clients that have trained at least once, bool [K].
        """
        ...

    def graph(self, memory: Tensor, clients: Sequence[str]) -> Graph:
        """The graph that stands in the memory."""
        ...

    def acts(self, round_number: int) -> bool:
        """Whether the graph moves adapters in this round, or is still warming up."""
        ...


@dataclass(frozen=True, slots=True)
class FixedGraph:
    """A graph that is given and acts from round 1; it remembers nothing.

    Attributes:
        given: the graph.
        sketch: entries of the sketches for the log's disagreement, 0 for exact inner products.
    """

    given: Graph
    sketch: int = 0

    @property
    def learned(self) -> bool:
        """No."""
        return False

    def initial(self, clients: Sequence[str]) -> Tensor:
        """Nothing."""
        return NO_EDGES

    def update(self, memory: Tensor, products: InnerProducts, trained: Tensor) -> Tensor:
        """Unchanged."""
        return memory

    def graph(self, memory: Tensor, clients: Sequence[str]) -> Graph:
        """The given graph, with its rows in the order of the clients.

        Raises:
            ConfigError: the graph is not between these clients.
        """
        if tuple(clients) == self.given.clients:
            return self.given
        if sorted(clients) != sorted(self.given.clients):
            different = sorted(set(clients) ^ set(self.given.clients))
            raise ConfigError(
                f"graph {self.given.kind!r}: its {len(self.given.clients)} clients are not the run's {len(clients)}; "
                f"{different[0] if different else clients[0]!r} is in only one of them (build the graph for the clients of the run)"
            )
        rows = torch.tensor(self.given.position(clients), dtype=torch.int64)
        return replace(self.given.moved(torch.argsort(rows)), clients=tuple(clients))

    def acts(self, round_number: int) -> bool:
        """Always."""
        return True


@dataclass(frozen=True, slots=True)
class LearnedGraph:
    """The similarity graph of the updates, remembered over rounds.

    Attributes:
        nearest: neighbours that each client chooses.
        memory: share of the old graph in the new one, 0..1.
        warmup_rounds: rounds in which the graph is learned and does not act.
        shuffle_seed: a control: when given, the graph that acts has its clients exchanged at random, the same way in all rounds;
            the memory keeps the true one.
        sketch: entries of the sketches that it is learned from, 0 for exact inner products. With sketches, remembered weights below a
            millionth of the largest are forgotten.
    """

    nearest: int = 3
    memory: float = 0.5
    warmup_rounds: int = 1
    shuffle_seed: int | None = None
    sketch: int = 0

    @property
    def learned(self) -> bool:
        """Yes."""
        return True

    def initial(self, clients: Sequence[str]) -> Tensor:
        """No edges."""
        return NO_EDGES

    def update(self, memory: Tensor, products: InnerProducts, trained: Tensor) -> Tensor:
        """The moving average of the similarity graphs; clients that never trained have no edges."""
        smallest_share = SMALLEST_SHARE if self.sketch else 0.0
        return remember(memory, products.similarity(trained, self.nearest), self.memory, len(trained), smallest_share)

    def graph(self, memory: Tensor, clients: Sequence[str]) -> Graph:
        """The remembered graph, shuffled for the control."""
        graph = Graph("similarity", tuple(clients), memory)
        return graph if self.shuffle_seed is None else shuffled(graph, self.shuffle_seed)

    def acts(self, round_number: int) -> bool:
        """From the first round after the warm-up."""
        return round_number > self.warmup_rounds


_FIXED: Mapping[str, Callable[[GraphSettings, Sequence[str], Mapping[str, str], int], Graph]] = {
    "random": lambda settings, clients, categories, seed: random_graph(clients, seed),
    "uniform": lambda settings, clients, categories, seed: uniform_graph(clients),
    "category": lambda settings, clients, categories, seed: category_graph(clients, categories),
    "file": lambda settings, clients, categories, seed: file_graph(settings.path, clients),
}


def sketch_entries(settings: GraphSettings, clients: int) -> int:
    """Entries of a client's sketch, 0 for exact inner products; "auto" is exact up to 512 clients and 1,024 entries above."""
    if settings.sketch != "auto":
        return settings.sketch
    return 0 if clients <= MOST_EXACT else DEFAULT_ENTRIES


def graph_source(settings: GraphSettings, clients: Sequence[str], categories: Mapping[str, str], seed: int) -> GraphSource:
    """Build what [graph] asks for.

    Args:
        settings: the section.
        clients: ids, in the order of the rows.
        categories: client id -> category; only kind "category" reads it.
        seed: of the random graph and of the shuffle.

    Raises:
        ConfigError: categories are missing, the graph file is wrong, or there are too many pairs.
    """
    sketch = sketch_entries(settings, len(clients))
    if settings.kind not in _FIXED:
        return LearnedGraph(settings.nearest, settings.memory, settings.warmup_rounds, seed if settings.shuffled else None, sketch)
    graph = _FIXED[settings.kind](settings, clients, categories, seed)
    return FixedGraph(shuffled(graph, seed) if settings.shuffled else graph, sketch)
