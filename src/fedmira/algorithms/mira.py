"""MIRA: every client keeps its own adapter, and related clients are pulled together along the task graph.

Elbakary et al., "MIRA: A Method of Federated Multi-Task Learning for Large Language Models", IEEE Networking Letters 2025,
arXiv 2410.15524, equation 8, with gamma = eta * lambda:

    w_k  <-  w_k - gamma * sum_l a_kl (w_k - w_l)          for the clients k of the round, all from one snapshot

Ours beyond the paper: a learned graph, size-aware steps, neighbours that are not in the round, and mixing the products
B A exactly in place of the factors one by one, which also lets clients have different ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmira.adapters import Adapter, cross_gram, dot_products, gram, mix, weighted_sum
from fedmira.algorithms.base import Combined, Diagnostics, PlainClient, ServerState
from fedmira.algorithms.context import AlgorithmContext
from fedmira.algorithms.mixing import Mixing, mixing_matrix
from fedmira.config.schema import MiraSettings
from fedmira.errors import ConfigError
from fedmira.graphs import Graph
from fedmira.messages import ClientId, Payload, Reply

__all__ = ["Mira", "build_mira"]

LAST_ROUND, GRAPH = "last_round", "graph"
NO_DIFFERENCE = 1e-12
"""A squared difference below this share of the largest squared norm is rounding."""

Taken = tuple[list[Adapter], list[float]]
"""Adapters and the scale alpha / rank of each."""


def _mix_products(taken: Taken, weights: list[float], rank: int, scale: float, own: Adapter) -> tuple[Adapter, float]:
    """sum_l P_kl s_l B_l A_l at the receiver's rank and scale, and the norm that the rank could not hold."""
    mixed = mix(taken[0], weights, taken[1], rank, scale, own)
    return mixed.adapter, mixed.tail


def _mix_factors(taken: Taken, weights: list[float], rank: int, scale: float, own: Adapter) -> tuple[Adapter, float]:
    """sum_l P_kl A_l and sum_l P_kl B_l, which keeps the rank."""
    return weighted_sum(taken[0], weights), 0.0


_MIX: Mapping[str, Callable[[Taken, list[float], int, float, Adapter], tuple[Adapter, float]]] = {
    "product": _mix_products,
    "factor": _mix_factors,
}
_INNER_PRODUCTS: Mapping[str, Callable[[Taken, Taken], Tensor]] = {
    "product_gram": lambda rows, columns: cross_gram(*rows, *columns),
    "factor_gram": lambda rows, columns: dot_products(rows[0], columns[0]),
}
"""Names in the state's numbers -> inner products [rows, columns]."""


def _disagreement(weights: Tensor, trained: Tensor, products: Tensor) -> float:
    """1/2 sum_kl a_kl |x_k - x_l|^2 over clients that have trained, from inner products: the trace of L G."""
    among = weights * (trained[:, None] & trained[None, :])
    laplacian = torch.diag(among.sum(dim=1)) - among
    return max(0.0, float((laplacian * products).sum()))


@dataclass(frozen=True, slots=True)
class Mira(PlainClient):
    """The server half.

    The state holds an adapter a client, and as numbers "last_round" (int64 [K], 0 = never trained), "product_gram" or
    "factor_gram" (float64 [K, K], inner products of the adapters that have trained, kept so that a round computes only the
    rows of its own clients), and "graph" (float64 [K, K], the memory of a learned graph).

    Attributes:
        settings: the [algorithm] section.
        context: the federation.
    """

    settings: MiraSettings
    context: AlgorithmContext

    @property
    def aligns(self) -> bool:
        """Whether the coupling is above 0."""
        return _strength(self.settings) > 0

    @property
    def _gram(self) -> str:
        """Name of the inner products of the space that is mixed."""
        return f"{self.settings.space}_gram"

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """Each client's start, nobody trained, no graph learned."""
        clients, graph = self.context.clients, self.context.graph
        numbers = {self._gram: torch.zeros(len(clients), len(clients), dtype=torch.float64)}
        if graph.learned:
            numbers |= {"product_gram": torch.zeros(len(clients), len(clients), dtype=torch.float64), GRAPH: graph.initial(clients)}
        return ServerState(dict(starts), {LAST_ROUND: torch.zeros(len(clients), dtype=torch.int64), **numbers})

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """The client's own adapter."""
        return Payload({"adapter": state.adapters[client]})

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """The client's own adapter."""
        return state.adapters[client]

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Write the replies in, learn the graph, and move the clients of the round towards their neighbours."""
        clients, source = self.context.clients, self.context.graph
        round_number, row = replies[0].round, {client: k for k, client in enumerate(clients)}
        cohort = sorted(row[reply.client_id] for reply in replies)
        snapshot = {**state.adapters, **{reply.client_id: reply.payload.tensors["adapter"] for reply in replies}}
        last_round = state.numbers[LAST_ROUND].clone()
        last_round[cohort] = round_number
        trained = last_round > 0
        numbers = {**state.numbers, LAST_ROUND: last_round, **self._grams(state.numbers, snapshot, cohort, trained)}
        memory = source.initial(clients)
        if source.learned:
            numbers[GRAPH] = memory = source.update(numbers[GRAPH], numbers["product_gram"], trained)
        graph, acts = source.graph(memory, clients), source.acts(round_number)
        mixing = self._mixing(graph.weights if acts else torch.zeros_like(graph.weights), cohort, trained, replies)

        moving = [k for k in cohort if float(mixing.pulls[k]) > 0]
        mixed = {clients[k]: self._mixed(k, mixing, snapshot) for k in moving}
        adapters = {**snapshot, **{client: adapter for client, (adapter, _) in mixed.items()}}
        before = numbers[self._gram]
        numbers |= self._grams(numbers, adapters, moving, trained)
        round_log = {
            "server_step": mixing.server_step,
            "max_degree": float(graph.degrees.max()),
            "guarded": float(mixing.guarded),
            "disagreement_before": _disagreement(graph.weights, trained, before),
            "disagreement_after": _disagreement(graph.weights, trained, numbers[self._gram]),
        }
        diagnostics = Diagnostics(
            round=round_log,
            clients={clients[k]: self._client_log(k, graph, mixing, snapshot, mixed) for k in cohort},
            graph=graph if acts else None,
            expects_motion=frozenset(clients[k] for k in moving if self._neighbours_differ(k, mixing, before)),
        )
        return Combined(ServerState(adapters, numbers), diagnostics)

    def _taken(self, positions: Sequence[int], adapters: Mapping[ClientId, Adapter]) -> Taken:
        """The adapters at these positions, with their scales."""
        clients = [self.context.clients[k] for k in positions]
        return [adapters[client] for client in clients], [self.context.scale(client) for client in clients]

    def _grams(
        self, numbers: Mapping[str, Tensor], adapters: Mapping[ClientId, Adapter], changed: list[int], trained: Tensor
    ) -> dict[str, Tensor]:
        """The inner products in the numbers, with rows and columns of the changed clients computed anew."""
        others = torch.nonzero(trained).flatten().tolist()
        row, column = torch.tensor(changed, dtype=torch.int64)[:, None], torch.tensor(others, dtype=torch.int64)[None, :]
        result = {name: products.clone() for name, products in numbers.items() if name in _INNER_PRODUCTS}
        for name, products in result.items():
            block = _INNER_PRODUCTS[name](self._taken(changed, adapters), self._taken(others, adapters))
            products[row, column] = block
            products[column.T, row.T] = block.T
        return result

    def _mixing(self, weights: Tensor, cohort: list[int], trained: Tensor, replies: Sequence[Reply]) -> Mixing:
        """P of this round."""
        examples = {reply.client_id: reply.num_examples for reply in replies}
        rows = [examples.get(client, self.context.rows[client]) for client in self.context.clients]
        in_cohort = torch.zeros(len(rows), dtype=torch.bool)
        in_cohort[cohort] = True
        return mixing_matrix(self.settings, weights, in_cohort, trained, torch.tensor(rows, dtype=torch.float64))

    def _mixed(self, k: int, mixing: Mixing, snapshot: Mapping[ClientId, Adapter]) -> tuple[Adapter, float]:
        """Client k's new adapter, and the norm of what its rank could not hold."""
        own = self.context.clients[k]
        positions = torch.nonzero(mixing.matrix[k]).flatten().tolist()
        taken, weights = self._taken(positions, snapshot), mixing.matrix[k, positions].tolist()
        return _MIX[self.settings.space](taken, weights, self.context.ranks[own], self.context.scale(own), snapshot[own])

    def _neighbours_differ(self, k: int, mixing: Mixing, products: Tensor) -> bool:
        """Whether the weighted mean of k's neighbours is another point than k itself."""
        toward = mixing.matrix[k].clone()
        toward[k] -= 1
        toward /= mixing.pulls[k]
        involved = products.diagonal()[toward != 0].max()
        return bool(toward @ products @ toward > NO_DIFFERENCE * involved)

    def _client_log(
        self, k: int, graph: Graph, mixing: Mixing, before: Mapping[ClientId, Adapter], mixed: Mapping[ClientId, tuple[Adapter, float]]
    ) -> dict[str, float]:
        """What happened to client k; |moved| and |update| are norms of s B A in both spaces, so that they compare.

        Where the update is zero and the client is moved all the same, relative_pull is 1.
        """
        client = self.context.clients[k]
        log = {"pull": float(mixing.pulls[k]), "relative_pull": 0.0, "degree": float(graph.degrees[k]), "truncation": 0.0}
        if client in mixed:
            after, tail = mixed[client]
            pair = gram([before[client], after], [self.context.scale(client)] * 2)
            moved = max(0.0, float(pair[0, 0] + pair[1, 1] - 2 * pair[0, 1]))
            update = float(pair[0, 0]) or moved or 1.0
            relative = math.sqrt(moved / update)
            # Factoring a product anew costs float32 rounding; that is no motion.
            log["relative_pull"] = relative if relative > torch.finfo(torch.float32).eps else 0.0
            log["truncation"] = tail / math.sqrt(update)
        return log


def _strength(settings: MiraSettings) -> float:
    """The coupling, or the server step that stands in its place."""
    return settings.coupling if settings.server_step is None else settings.server_step


def build_mira(settings: MiraSettings, context: AlgorithmContext) -> Mira:
    """Check that the settings can act on this federation.

    Raises:
        ConfigError: alignment is on and could never move anything (a cohort of one without stale neighbours, a graph without edges,
            a single client), or factors of different ranks would be mixed; all of these together.
    """
    graph, count = context.graph, len(context.clients)
    weights = graph.initial(context.clients)
    strength = _strength(settings)
    problems = []
    if strength > 0 and context.cohort == 1 and settings.neighbours != "stale":
        problems.append(
            f"mira: 1 client a round has no neighbours when algorithm.neighbours = {settings.neighbours!r}; needs at least 2 "
            "(set it to 'stale', or raise rounds.participation)"
        )
    if strength > 0 and graph.learned and count < 2:
        problems.append(
            f"mira: a graph of {count} client has no edge, so alignment cannot act; needs at least 2 "
            "(set algorithm.name to 'local', or algorithm.coupling to 0)"
        )
    if strength > 0 and not graph.learned and not bool(weights.any()):
        problems.append(
            f"mira: the graph of {count} clients has no edge, so alignment cannot act; needs at least 1 "
            "(choose another graph.kind, or set algorithm.coupling to 0)"
        )
    unequal = context.unequal_ranks()
    if settings.space == "factor" and unequal is not None:
        one, other = unequal
        problems.append(
            f"mira: client {one!r} has rank {context.ranks[one]} and client {other!r} rank {context.ranks[other]}; factors of different "
            "ranks cannot be mixed (set algorithm.space to 'product')"
        )
    if problems:
        raise ConfigError(problems)
    return Mira(settings, context)
