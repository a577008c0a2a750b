"""Every client trains an adapter of its own beside a frozen one that holds the rest of the world.

Bian et al. 2026, "FedALT: Federated Fine-Tuning through Adaptive Local Training with Rest-of-World
LoRA", AAAI 2026. With L_k the adapter that client k trains, R_k the frozen one, a_kl the graph and
rho the share of the rest, and both sums over other clients that have trained,

    h = W0 x + L_k x + rho R_k x,     R_k = sum_l a_kl / delta_k L_l,     delta_k = sum_l a_kl

R_k is computed when the client is about to train and stays as it is until its next round; nothing
ever overwrites L_k. With the uniform graph the weights are the paper's 1 / (K - 1); other graphs
are ours. The paper weighs both parts by a mixer that looks at the input, with shares that sum to
one, which is no LoRA adapter any more; here the own part has the weight 1 and the rest rho, one
number, and both parts are one adapter: the first directions are L_k, the others rho R_k, cut to the
directions that the rank leaves for it; the log's `truncation` says what did not fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedmira.adapters import (
    Adapter,
    gram,
    mix,
    replaced,
)
from fedmira.config.methods import Need
from fedmira.config.section import Count, setting
from fedmira.errors import ConfigError
from fedmira.graphs import Graph
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import (
    Combined,
    Diagnostics,
    Method,
    ServerState,
    Start,
    Trained,
)
from fedmira.methods.parts.kept_products import KeptProducts, Taken
from fedmira.methods.parts.partly_sent import PartlySent
from fedmira.methods.parts.rank_split import RankSplit, check_split

__all__ = ["FedAlt"]

LAST_ROUND, GRAPH = "last_round", "graph"


class FedAlt(Method):
    """The state holds every client's two-part adapter as it last trained it.

    Its numbers are "last_round" (int64 [K], 0 = never trained) and, where the graph is learned,
    "graph" with the inner products that it is learned from.
    """

    name: ClassVar[str] = "fedalt"
    title: ClassVar[str] = "FedALT"
    searched: ClassVar[Mapping[str, tuple[Any, ...]]] = {"rest_share": (0.25, 0.5, 1.0)}
    partly_sent: ClassVar[bool] = True
    always_needs: ClassVar[Mapping[Need, str]] = {Need.FACTORS: ""}
    trained_rank: Count = setting(
        0,
        help=(
            "directions of an adapter that are trained; the remaining ones of `adapter.rank` "
            "hold the frozen part. 0 takes half"
        ),
    )
    rest_share: float = setting(
        0.5, ge=0, help="rho, the weight of what the rest of the world learned"
    )

    @property
    def split(self) -> RankSplit:
        """Where adapters are divided."""
        return RankSplit(self.trained_rank)

    def check(self) -> None:
        """There must be a rest of the world, and room for it.

        Raises:
            ConfigError: a client's rank leaves a part empty, or nobody has a neighbour.
        """
        source, clients = self.context.graph, self.context.clients
        check_split(self.name, self.trained_rank, self.context)
        fixed_edges = len(source.graph(source.initial(clients), clients).edge_list)
        if len(clients) < 2 or not (source.learned or fixed_edges):
            raise ConfigError(
                f"{self.name}: the graph of {len(clients)} client{'s' if len(clients) > 1 else ''} "
                "has no edge, so nobody has a rest of the world; needs at least 1 (choose another "
                "graph.kind, or set algorithm.name to 'local')"
            )

    @property
    def _kept(self) -> KeptProducts:
        return KeptProducts((self._compared,), self.context.graph.sketch)

    @property
    def _compared(self) -> str:
        """Own parts are never pulled: they are what their training has added."""
        space = self.context.graph.space
        return "product" if space == "travelled" else space

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The common start, nobody trained, no graph learned."""
        clients, source = self.context.clients, self.context.graph
        numbers = {LAST_ROUND: torch.zeros(len(clients), dtype=torch.int64)}
        if source.learned:
            numbers |= {GRAPH: source.initial(clients), **self._kept.initial(len(clients))}
        return ServerState(dict(starts), numbers)

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """The client's own part, which it has, and the rest of the world, which travels."""
        before = state.adapters[client]
        rest = self._rest(state, client)
        return PartlySent(
            {"adapter": self.split.joined(self.split.trained(before), rest)}, sent={"rest": rest}
        )

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Keep what each client trained, and learn the graph from the own parts.

        What the frozen parts of the round left out is logged.
        """
        clients, source = self.context.clients, self.context.graph
        changes = {reply.client_id: reply.payload.tensors["adapter"] for reply in replies}
        adapters = replaced(state.adapters, changes)
        cohort = sorted(clients.index(client) for client in changes)
        numbers = {**state.numbers, LAST_ROUND: state.numbers[LAST_ROUND].clone()}
        numbers[LAST_ROUND][cohort] = replies[0].round
        figures: Mapping[str, float] = {}
        if source.learned:
            trained = numbers[LAST_ROUND] > 0
            numbers |= self._kept.copied(state.numbers)
            self._kept.refresh(numbers, cohort, trained, partial(self._own_parts, adapters))
            learned = source.update(numbers[GRAPH], self._kept.of(numbers, self._compared), trained)
            numbers[GRAPH], figures = learned.memory, learned.figures
        after = ServerState(adapters, numbers)
        graph = self._graph(after)
        degrees = graph.degrees if graph else torch.zeros(len(clients))
        cut = {
            "truncation": math.sqrt(
                sum(self._left_out(state, client, changes[client]) for client in sorted(changes))
            )
        }
        return Combined(
            after,
            Diagnostics(
                {**cut, **figures},
                {clients[k]: {"degree": float(degrees[k])} for k in cohort},
                graph,
            ),
        )

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """Both parts, the rest of the world as it was when the client trained beside it."""
        return state.adapters[client]

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Start from both parts; the rest of the world gets no gradient."""
        return Start(payload.tensors["adapter"], self.split.still)

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send the own part.

        The rest of the world is what it was, whatever weight decay did to it meanwhile.
        """
        own = self.split.trained(trained.adapter)
        return PartlySent(
            {"adapter": self.split.joined(own, self.split.frozen(payload.tensors["adapter"]))},
            sent={"own": own},
        ), None

    def _own_parts(self, adapters: Mapping[ClientId, Adapter], positions: Sequence[int]) -> Taken:
        """The own parts of the clients at these positions, with their scales."""
        clients = [self.context.clients[k] for k in positions]
        return [self.split.trained(adapters[client]) for client in clients], [
            self.context.scale(client) for client in clients
        ]

    def _graph(self, state: ServerState) -> Graph | None:
        """The graph of the next round, None where it does not act yet."""
        clients, source = self.context.clients, self.context.graph
        if not source.acts(int(state.numbers[LAST_ROUND].max()) + 1):
            return None
        return source.graph(state.numbers.get(GRAPH, source.initial(clients)), clients)

    def _rest(self, state: ServerState, client: ClientId) -> Adapter:
        """rho R_k in the frozen part's rank.

        Zero with the start's A where no neighbour has trained.
        """
        rank, scale, room = (
            self.context.ranks[client],
            self.context.scale(client),
            self.split.frozen(state.adapters[client]),
        )
        (parts, scales), weights = self._others(state, client)
        return mix(parts, weights.tolist(), scales, rank - self.split.of(rank), scale, room).adapter

    def _left_out(self, state: ServerState, client: ClientId, trained: Adapter) -> float:
        """|rho R_k - what the client held of it|^2, norms of s B A.

        It travels with neither message, so it is measured afterwards.
        """
        (parts, scales), weights = self._others(state, client)
        products = gram([*parts, self.split.frozen(trained)], [*scales, self.context.scale(client)])
        difference = torch.cat([weights, torch.tensor([-1.0], dtype=torch.float64)])
        return max(0.0, float(difference @ products @ difference))

    def _others(self, state: ServerState, client: ClientId) -> tuple[Taken, Tensor]:
        """The own parts that a client's rest of the world is made of, and float64 weights."""
        weights = self._weights(state, self.context.clients.index(client))
        others = torch.nonzero(weights).flatten().tolist()
        return self._own_parts(state.adapters, others), weights[others]

    def _weights(self, state: ServerState, k: int) -> Tensor:
        """rho a_kl / delta_k over the clients that have trained, float64 [K]."""
        trained, graph = state.numbers[LAST_ROUND] > 0, self._graph(state)
        weights = torch.zeros(len(trained), dtype=torch.float64)
        if graph is None:
            return weights
        ends, strengths = graph.pairs, graph.edge_weights
        for own, other in ((0, 1), (1, 0)):
            mine = ends[:, own] == k
            weights[ends[mine, other]] = strengths[mine]
        weights = weights * trained
        return weights * (self.rest_share / weights.sum()) if bool(weights.any()) else weights
