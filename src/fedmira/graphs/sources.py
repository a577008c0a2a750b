"""Where an algorithm gets its graph from, round by round.

A fixed graph, or one that is learned from the updates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from fedmira.config import GraphSettings
from fedmira.errors import ConfigError
from fedmira.graphs.blocks import Blocks, check_blocks, in_blocks
from fedmira.graphs.builders import (
    all_pairs,
    category_graph,
    check_pairs,
    random_graph,
    shuffled,
    uniform_graph,
)
from fedmira.graphs.collaboration import collaboration_weights
from fedmira.graphs.edges import NO_EDGES, list_of_matrix
from fedmira.graphs.files import file_graph
from fedmira.graphs.graph import Graph
from fedmira.graphs.products import InnerProducts
from fedmira.graphs.similarity import SMALLEST_SHARE, Likeness, remember

__all__ = [
    "BlocksGraph",
    "CollaborationGraph",
    "FixedGraph",
    "GraphSource",
    "Learned",
    "LearnedGraph",
    "graph_source",
    "sketch_entries",
]

MOST_EXACT = 512
"""Most clients whose inner products are kept one by one when the config leaves it open."""
DEFAULT_ENTRIES = 1024
"""Entries of a sketch, 4 KiB, when the config leaves it open: cosines are off by about 0.03."""


@dataclass(frozen=True, slots=True)
class Learned:
    """What a round taught.

    Attributes:
        memory: edge list, float64 [E, 3].
        figures: of the cosines, for the log.
    """

    memory: Tensor
    figures: Mapping[str, float] = field(default_factory=dict)


class GraphSource(Protocol):
    """A graph that may change from round to round.

    What it remembers is an edge list that the algorithm's state keeps.
    """

    @property
    def learned(self) -> bool:
        """Whether the graph changes with the updates, so that checkpoints hold its memory."""
        ...

    @property
    def space(self) -> str:
        """Whose inner products it is learned from.

        "travelled", the sums of what local training added to each client's adapter, "product", the
        adapters, or "subspace", where these point to; none where it is fixed.
        """
        ...

    @property
    def absolute(self) -> bool:
        """Whether a degree is the share of the way to the neighbours' mean by itself.

        Elsewhere weights are relative to the largest degree.
        """
        ...

    @property
    def sketch(self) -> int:
        """Entries of the sketches from which inner products between updates are estimated.

        0 where they are exact.
        """
        ...

    def initial(self, clients: Sequence[str]) -> Tensor:
        """The memory before round 1: an edge list, float64 [E, 3].

        Its rows are in the order of the clients.
        """
        ...

    def update(self, memory: Tensor, products: InnerProducts, trained: Tensor) -> Learned:
        """The memory after a round.

        Args:
            memory: edge list, float64 [E, 3].
            products: inner products of all clients, of its space.
            trained: clients that have trained at least once, bool [K].
        """
        ...

    def graph(self, memory: Tensor, clients: Sequence[str]) -> Graph:
        """The graph that stands in the memory.

        Args:
            memory: what `initial` or the last `update` gave.
            clients: ids, in the order of the rows.
        """
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
        """False, as updates do not change it."""
        return False

    @property
    def space(self) -> str:
        """Of no meaning here."""
        return "product"

    @property
    def absolute(self) -> bool:
        """False: weights are relative to the largest degree."""
        return False

    def initial(self, clients: Sequence[str]) -> Tensor:
        """No edges, as nothing has to be remembered."""
        return NO_EDGES

    def update(self, memory: Tensor, products: InnerProducts, trained: Tensor) -> Learned:
        """The memory as it was, whatever the round brought."""
        return Learned(memory)

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
                f"graph {self.given.kind!r}: its {len(self.given.clients)} clients are not "
                f"the run's {len(clients)}; "
                f"{different[0] if different else clients[0]!r} is in only one of them "
                "(build the graph for the clients of the run)"
            )
        rows = torch.tensor(self.given.position(clients), dtype=torch.int64)
        return replace(self.given.moved(torch.argsort(rows)), clients=tuple(clients))

    def acts(self, round_number: int) -> bool:
        """True in every round, as there is nothing to warm up."""
        return True


@dataclass(frozen=True, slots=True)
class LearnedGraph:
    """The similarity graph of the updates, remembered over rounds.

    Attributes:
        nearest: neighbours that each client chooses.
        memory: share of the old graph in the new one, 0..1.
        warmup_rounds: rounds in which the graph is learned and does not act.
        shuffle_seed: a control: when given, the graph that acts has its clients exchanged at
            random, the same way in all rounds; the memory keeps the true one.
        sketch: entries of the sketches that it is learned from, 0 for exact inner products. With
            sketches, remembered weights below a millionth of the largest are forgotten.
        space: "travelled" compares the sums of what local training added to each client's adapter,
            which no pull has made alike; "product" the adapters; "subspace" the column spaces of
            their modules, by principal angles.
    """

    nearest: int = 3
    memory: float = 0.5
    warmup_rounds: int = 1
    shuffle_seed: int | None = None
    sketch: int = 0
    space: str = "travelled"

    @property
    def absolute(self) -> bool:
        """True: a degree is what its cosines are worth."""
        return True

    @property
    def kind(self) -> str:
        """The name of this kind of graph in graph.json."""
        return "similarity"

    @property
    def learned(self) -> bool:
        """True, as it follows the updates."""
        return True

    def initial(self, clients: Sequence[str]) -> Tensor:
        """No edges, as nobody has trained yet."""
        return NO_EDGES

    def update(self, memory: Tensor, products: InnerProducts, trained: Tensor) -> Learned:
        """The moving average of the rounds' graphs; clients that never trained have no edges."""
        smallest_share = SMALLEST_SHARE if self.sketch else 0.0
        found = self.of_round(products, trained)
        edges = remember(memory, found.memory, self.memory, len(trained), smallest_share)
        return replace(found, memory=edges)

    def of_round(self, products: InnerProducts, trained: Tensor) -> Learned:
        """The graph of this round alone.

        Args:
            products: inner products of the updates of all clients.
            trained: which clients have trained, bool [K].
        """
        found = products.likeness(trained, self.nearest)
        return Learned(found.edges, _figures(found))

    def graph(self, memory: Tensor, clients: Sequence[str]) -> Graph:
        """The remembered graph, shuffled for the control."""
        graph = Graph(self.kind, tuple(clients), memory)
        return graph if self.shuffle_seed is None else shuffled(graph, self.shuffle_seed)

    def acts(self, round_number: int) -> bool:
        """From the first round after the warm-up."""
        return round_number > self.warmup_rounds


@dataclass(frozen=True, slots=True)
class BlocksGraph(LearnedGraph):
    """The similarity graph, whose weights between blocks are lowered before neighbours are chosen.

    Attributes:
        blocks: c, how many are aimed at (`graphs.blocks`); 0 takes the largest gap between
            eigenvalues, in each round anew.
        strength: beta, the price on weights between blocks; with 0 it is the similarity graph.
    """

    blocks: int = 0
    strength: float = 1.0

    @property
    def kind(self) -> str:
        """The name of this kind of graph in graph.json."""
        return "blocks"

    def of_round(self, products: InnerProducts, trained: Tensor) -> Learned:
        """The graph of this round alone; the log has c and both sums of eigenvalues."""
        made: list[Blocks] = []

        def arrange(weights: Tensor) -> Tensor:
            made.append(in_blocks(weights, self.blocks, self.strength))
            return made[-1].weights

        found = products.likeness(trained, self.nearest, arrange)
        figures = {
            name: value
            for blocks in made
            for name, value in (
                ("blocks", float(blocks.count)),
                ("eigenvalues_before", blocks.before),
                ("eigenvalues_after", blocks.after),
            )
        }
        return Learned(found.edges, {**_figures(found), **figures})


@dataclass(frozen=True, slots=True)
class CollaborationGraph(LearnedGraph):
    """pFedGraph's collaboration weights, made symmetric.

    The weight a_kl is (x_kl + x_lk) / 2 between different clients.

    Every client's weights x_k follow from its cosines to all that have trained and from their data
    (`graphs.collaboration`); `nearest` is not read. Weights are not scaled: the paper's clients are
    made of x_kl w_l, which is the step gamma = 1 along x.

    Attributes:
        alpha: weight of the data shares against likeness.
        rows: training rows of each client; empty for equal shares.
    """

    space: str = "product"
    alpha: float = 0.8
    rows: tuple[float, ...] = ()

    @property
    def kind(self) -> str:
        """The name of this kind of graph in graph.json."""
        return "pfedgraph"

    @property
    def absolute(self) -> bool:
        """False: the paper's weights are made to sum to 1."""
        return False

    def of_round(self, products: InnerProducts, trained: Tensor) -> Learned:
        """From the cosines between clients that have trained and whose update is not zero.

        The others have no edges.
        """
        cosines = products.cosines(trained)
        taking_part = torch.nonzero(cosines.diagonal()).flatten()
        if len(taking_part) < 2:
            return Learned(NO_EDGES)
        rows = torch.tensor(self.rows or [1.0] * len(trained), dtype=torch.float64)[taking_part]
        chosen = collaboration_weights(
            cosines[taking_part][:, taking_part], rows / rows.sum(), self.alpha
        )
        weights = torch.zeros_like(cosines)
        weights[taking_part[:, None], taking_part[None, :]] = (chosen + chosen.T) / 2
        return Learned(list_of_matrix(weights.fill_diagonal_(0)))


def _figures(found: Likeness) -> dict[str, float]:
    """Of the cosines, for the log."""
    return {
        "cosine_noise": found.noise,
        "cosine_largest": found.largest,
        "cosine_mean": found.mean,
    }


@dataclass(frozen=True, slots=True)
class _Members:
    """Who is to be related.

    Attributes:
        clients: ids, in the order of the rows; newcomers at the end.
        founders: those who were there from the beginning.
        categories: client id -> category.
        expected: names that a graph file may hold beside those of the founders.
    """

    clients: tuple[str, ...]
    founders: tuple[str, ...]
    categories: Mapping[str, str]
    expected: frozenset[str]


_FIXED: Mapping[str, Callable[[GraphSettings, _Members, int], Graph]] = {
    # A draw for one client more would be another graph for all of them.
    "random": lambda settings, of, seed: replace(
        random_graph(of.founders, seed), clients=of.clients
    ),
    "uniform": lambda settings, of, seed: uniform_graph(of.clients),
    "category": lambda settings, of, seed: category_graph(of.clients, of.categories),
    "file": lambda settings, of, seed: file_graph(settings.path, of.clients, of.expected),
}


def sketch_entries(settings: GraphSettings, clients: int) -> int:
    """Entries of a client's sketch, 0 for exact inner products.

    "auto" is exact up to 512 clients and 1,024 entries above.

    Args:
        settings: of [graph].
        clients: how many there are.
    """
    if settings.sketch != "auto":
        return settings.sketch
    return 0 if clients <= MOST_EXACT else DEFAULT_ENTRIES


def _similarity(
    settings: GraphSettings, clients: Sequence[str], rows: Mapping[str, int], **common: Any
) -> LearnedGraph:
    return LearnedGraph(nearest=settings.nearest, **common)


def _blocks(
    settings: GraphSettings, clients: Sequence[str], rows: Mapping[str, int], **common: Any
) -> LearnedGraph:
    check_blocks(settings.blocks, len(clients))
    return BlocksGraph(
        nearest=settings.nearest, blocks=settings.blocks, strength=settings.strength, **common
    )


def _collaboration(
    settings: GraphSettings, clients: Sequence[str], rows: Mapping[str, int], **common: Any
) -> LearnedGraph:
    check_pairs(settings.kind, len(clients), all_pairs(len(clients)))
    return CollaborationGraph(
        alpha=settings.alpha,
        rows=tuple(float(rows[client]) for client in clients if rows),
        **common | {"space": "product" if common["space"] == "travelled" else common["space"]},
    )


_LEARNED: Mapping[str, Callable[..., LearnedGraph]] = {
    "similarity": _similarity,
    "blocks": _blocks,
    "pfedgraph": _collaboration,
}
_SPACES: Mapping[str, str] = {"cosine": "travelled", "principal-angles": "subspace"}


def graph_source(
    settings: GraphSettings,
    clients: Sequence[str],
    categories: Mapping[str, str],
    seed: int,
    rows: Mapping[str, int] = MappingProxyType({}),
    newcomers: int = 0,
    expected: Collection[str] = frozenset(),
) -> GraphSource:
    """Build what [graph] asks for.

    The edges between those who were there from the beginning do not depend on newcomers. These have
    edges by the rule of the graph, or as they are learned; in a random graph they have none, and of
    a file those that it lists.

    Args:
        settings: the section.
        clients: ids, in the order of the rows.
        categories: client id -> category; only kind "category" reads it.
        seed: of the random graph and of the shuffle.
        rows: client id -> training rows; only kind "pfedgraph" reads it, and takes all alike where
            it is empty.
        newcomers: how many at the end of `clients` came after the run had begun.
        expected: names that a graph file may hold beside those of the clients.

    Raises:
        ConfigError: categories are missing, the graph file is wrong, or there are too many pairs.
    """
    founders = tuple(clients)[: len(clients) - newcomers]
    # What is kept of adapters has one form throughout a run, whoever comes.
    sketch = sketch_entries(settings, len(founders))
    if settings.kind not in _FIXED:
        return _LEARNED[settings.kind](
            settings,
            clients,
            rows,
            memory=settings.memory,
            warmup_rounds=settings.warmup_rounds,
            shuffle_seed=seed if settings.shuffled else None,
            sketch=sketch,
            space=_SPACES[settings.measure],
        )
    optional = frozenset({*expected, *clients[len(founders) :]} - {*founders})
    members = _Members(tuple(clients), founders, categories, optional)
    graph = _FIXED[settings.kind](settings, members, seed)
    return FixedGraph(shuffled(graph, seed) if settings.shuffled else graph, sketch)
