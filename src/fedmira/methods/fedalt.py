"""Every client trains an adapter of its own beside a frozen one that holds the rest of the world.

Bian et al. 2026, "FedALT: Federated Fine-Tuning through Adaptive Local Training with Rest-of-World
LoRA", AAAI 2026. With L_k the adapter that client k trains, R_k the frozen one, a_kl the graph and
rho the share of the rest, and both sums over other clients that have trained,

    h = W0 x + L_k x + rho R_k x,     R_k = sum_l a_kl / delta_k L_l,     delta_k = sum_l a_kl

R_k is computed when the client is about to train and stays as it is until its next round; nothing
ever overwrites L_k. With the uniform graph the weights are the paper's 1 / (K - 1); other graphs
are ours. By default R_k is the mean of the products, the own part has the weight 1 and the rest
rho, and both parts are one adapter: the first directions are L_k, the others rho R_k, cut to the
directions that the rank leaves for it; the log's `truncation` says what did not fit.

Their code averages factors, and the mixer weighs both parts anew for each input by shares
that sum to one and begin near one half, which is no LoRA adapter any more. What of it fits into one
is `rest_space = "factor"`, where R_k has the means of the others' A and of their B, apart, and
`learned_share = true`, where the mixer is one number g_k of each client,

    h = W0 x + g_k L_k x + (1 - g_k) R_k x

which is trained beside L_k, begins at 1/2 and folds into the factors (`parts/learned_share.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from fedmira.adapters import (
    Adapter,
    gram,
    mix,
    replaced,
    weighted_sum,
)
from fedmira.adapters.low_rank import UP
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
from fedmira.methods.parts.learned_share import MOST, LearnedShare, after_training
from fedmira.methods.parts.partly_sent import PartlySent
from fedmira.methods.parts.rank_split import RankSplit, check_split

__all__ = ["FedAlt"]

LAST_ROUND, GRAPH, OWN_SHARE = "last_round", "graph", "own_share"
FIRST_SHARE = 0.5
"""The learned share of the own part before anything was learned."""


class FedAlt(Method):
    """The state holds every client's two-part adapter as it last trained it.

    Its numbers are "last_round" (int64 [K], 0 = never trained); where the graph is learned, "graph"
    with the inner products that it is learned from; and where the share is learned, "own_share"
    (float64 [K]), of which each client's travels beside its part.
    """

    name: ClassVar[str] = "fedalt"
    title: ClassVar[str] = "FedALT"
    takes_newcomers: ClassVar[bool] = True
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
        0.5,
        ge=0,
        help=(
            "rho, the weight of what the rest of the world learned. Read where learned_share = "
            "false"
        ),
    )
    rest_space: Literal["product", "factor"] = setting(
        "product",
        help=(
            "whether the rest of the world is the mean of the others' products B A, cut to the "
            "rank that is left for it, or has the means of their A and B apart, as in the authors' "
            "code; then both parts have half of one rank that is common to all"
        ),
    )
    learned_share: bool = setting(
        False,
        help=(
            "whether each client learns one number g beside its part, which weighs the own part by "
            "g and the rest by 1 - g and begins at 1/2, in place of the weights 1 and rest_share"
        ),
    )
    share_rate: float = setting(
        0.02,
        gt=0,
        help="how far log(g / (1 - g)) moves in a local step. Read where learned_share = true",
    )

    @model_validator(mode="after")
    def _shares_are_read(self) -> FedAlt:
        unread = "rest_share" if self.learned_share else "share_rate"
        if getattr(self, unread) != FedAlt.model_fields[unread].default:
            raise ValueError(
                f"{unread} = {getattr(self, unread):g} is not read where learned_share = "
                f"{str(self.learned_share).lower()}; leave it out, or set learned_share = "
                f"{str(not self.learned_share).lower()}"
            )
        return self

    @property
    def needs(self) -> Mapping[Need, str]:
        """Two factors; of one rank where they are averaged apart."""
        factors = {
            Need.ONE_RANK: "algorithm.rest_space = 'factor', which averages factor by factor"
        }
        return {**self.always_needs, **(factors if self.rest_space == "factor" else {})}

    @property
    def returned(self) -> tuple[str, ...]:
        """The own share, where it is learned."""
        return (OWN_SHARE,) if self.learned_share else ()

    @property
    def split(self) -> RankSplit:
        """Where adapters are divided."""
        return RankSplit(self.trained_rank)

    def check(self) -> None:
        """There must be a rest of the world, and room for it.

        Raises:
            ConfigError: a client's rank leaves a part empty, nobody has a neighbour, or factors are
                to be averaged that are of different rank or have no room.
        """
        source, clients = self.context.graph, self.context.clients
        check_split(self.name, self.trained_rank, self.context)
        if self.rest_space == "factor":
            rank = self.context.largest_rank
            own = self.split.of(rank)
            if 2 * own != rank:
                raise ConfigError(
                    f"{self.name}: of rank {rank}, {own} directions are trained and {rank - own} "
                    "are left for the rest of the world; with rest_space = 'factor' both need the "
                    f"same (set adapter.rank to {2 * own}, or rest_space to 'product')"
                )
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
        if self.learned_share:
            numbers[OWN_SHARE] = torch.full((len(clients),), FIRST_SHARE, dtype=torch.float64)
        return ServerState(dict(starts), numbers)

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """The client's own part, which it has, and the rest of the world, which travels."""
        before = state.adapters[client]
        rest = self._rest(state, client)
        shares = {OWN_SHARE: self._own_share(state, client)} if self.learned_share else {}
        return PartlySent(
            {"adapter": self.split.joined(self.split.trained(before), rest)},
            shares,
            sent={"rest": rest},
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
        told: dict[ClientId, dict[str, float]] = {client: {} for client in changes}
        if self.learned_share:
            numbers[OWN_SHARE] = state.numbers[OWN_SHARE].clone()
            for reply in replies:
                # It comes from elsewhere, and parts are divided by it.
                share = min(max(reply.payload.scalars[OWN_SHARE], 1 - MOST), MOST)
                numbers[OWN_SHARE][clients.index(reply.client_id)] = share
                told[reply.client_id] = {OWN_SHARE: share}
        figures: Mapping[str, float] = {}
        if source.learned:
            trained = numbers[LAST_ROUND] > 0
            numbers |= self._kept.copied(state.numbers)
            took = partial(self._own_parts, ServerState(adapters, numbers))
            self._kept.refresh(numbers, cohort, trained, took)
            learned = source.update(numbers[GRAPH], self._kept.of(numbers, self._compared), trained)
            numbers[GRAPH], figures = learned.memory, learned.figures
        after = ServerState(adapters, numbers)
        graph = self._graph(after)
        degrees = graph.degrees if graph else torch.zeros(len(clients))
        for k in cohort:
            told[clients[k]]["degree"] = float(degrees[k])
        cut = (
            {} if self.rest_space == "factor" else {"truncation": self._cut(state, after, changes)}
        )
        return Combined(after, Diagnostics({**cut, **figures}, told, graph))

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """Both parts, the rest of the world as it was when the client trained beside it."""
        return state.adapters[client]

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Start from both parts; of the rest of the world a learned share moves, and no more."""
        adapter = payload.tensors["adapter"]
        if not self.learned_share:
            return Start(adapter, self.split.still)
        share = payload.scalars[OWN_SHARE]
        return LearnedShare(self.split, adapter, share, self.share_rate).start()

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send the own part.

        The rest of the world is what it was, whatever weight decay did to it meanwhile.
        """
        before, own = payload.tensors["adapter"], self.split.trained(trained.adapter)
        rest, shares = self.split.frozen(before), {}
        if self.learned_share:
            begun = payload.scalars[OWN_SHARE]
            share = after_training(self.split, before, trained.adapter, begun)
            shares = {OWN_SHARE: share}
            rest = _times((1 - share) / (1 - begun), rest)
        return PartlySent(
            {"adapter": self.split.joined(own, rest)}, shares, sent={"own": own}
        ), None

    def _own_parts(self, state: ServerState, positions: Sequence[int]) -> Taken:
        """The own parts of the clients at these positions, with their scales.

        A learned share is taken out again.
        """
        clients = [self.context.clients[k] for k in positions]
        return [self.split.trained(state.adapters[client]) for client in clients], [
            self.context.scale(client) / self._own_share(state, client) for client in clients
        ]

    def _own_share(self, state: ServerState, client: ClientId) -> float:
        """g_k, or 1 where it is not learned."""
        if not self.learned_share:
            return 1.0
        return float(state.numbers[OWN_SHARE][self.context.clients.index(client)])

    def _rest_weight(self, state: ServerState, client: ClientId) -> float:
        """1 - g_k, or rho."""
        return 1 - self._own_share(state, client) if self.learned_share else self.rest_share

    def _graph(self, state: ServerState) -> Graph | None:
        """The graph of the next round, None where it does not act yet."""
        clients, source = self.context.clients, self.context.graph
        if not source.acts(int(state.numbers[LAST_ROUND].max()) + 1):
            return None
        return source.graph(state.numbers.get(GRAPH, source.initial(clients)), clients)

    def _rest(self, state: ServerState, client: ClientId) -> Adapter:
        """R_k with its weight, in the frozen part's rank.

        Zero with the start's A where no neighbour has trained.
        """
        rank, scale, room = (
            self.context.ranks[client],
            self.context.scale(client),
            self.split.frozen(state.adapters[client]),
        )
        (parts, scales), weights = self._others(state, client)
        if self.rest_space == "factor":
            if not len(weights):
                return _times(0.0, room)
            # Scales differ by learned shares alone, which stand in B; A is averaged as it is.
            total = float(weights.sum())
            own = [_times(each / scale, part) for part, each in zip(parts, scales, strict=True)]
            return _times(total, weighted_sum(own, (weights / total).tolist()))
        return mix(parts, weights.tolist(), scales, rank - self.split.of(rank), scale, room).adapter

    def _cut(
        self, state: ServerState, after: ServerState, trained: Mapping[ClientId, Adapter]
    ) -> float:
        """Norm of what the frozen parts of the round left out.

        Args:
            state: before the round.
            after: behind it.
            trained: the adapters of the round's clients.
        """
        squares = 0.0
        for client in sorted(trained):
            moved = 1.0
            if self.learned_share:
                moved = self._rest_weight(after, client) / self._rest_weight(state, client)
            squares += self._left_out(state, client, trained[client], moved)
        return math.sqrt(squares)

    def _left_out(
        self, state: ServerState, client: ClientId, trained: Adapter, moved: float
    ) -> float:
        """|rho R_k - what the client held of it|^2, norms of s B A.

        It travels with neither message, so it is measured afterwards.

        Args:
            state: before the round.
            client: its id.
            trained: its adapter behind the round.
            moved: by what its weight of the rest was multiplied meanwhile.
        """
        (parts, scales), weights = self._others(state, client)
        held = self.context.scale(client) / moved
        products = gram([*parts, self.split.frozen(trained)], [*scales, held])
        difference = torch.cat([weights, torch.tensor([-1.0], dtype=torch.float64)])
        return max(0.0, float(difference @ products @ difference))

    def _others(self, state: ServerState, client: ClientId) -> tuple[Taken, Tensor]:
        """The own parts that a client's rest of the world is made of, and float64 weights."""
        weights = self._weights(state, self.context.clients.index(client))
        others = torch.nonzero(weights).flatten().tolist()
        return self._own_parts(state, others), weights[others]

    def _weights(self, state: ServerState, k: int) -> Tensor:
        """a_kl / delta_k with the weight of the rest, over those that have trained, float64 [K]."""
        trained, graph = state.numbers[LAST_ROUND] > 0, self._graph(state)
        weights = torch.zeros(len(trained), dtype=torch.float64)
        if graph is None:
            return weights
        ends, strengths = graph.pairs, graph.edge_weights
        for own, other in ((0, 1), (1, 0)):
            mine = ends[:, own] == k
            weights[ends[mine, other]] = strengths[mine]
        weights = weights * trained
        if not bool(weights.any()):
            return weights
        return weights * (self._rest_weight(state, self.context.clients[k]) / weights.sum())


def _times(factor: float, part: Adapter) -> Adapter:
    """The product of a part times a number, which goes into B."""
    return {name: factor * tensor if name.endswith(UP) else tensor for name, tensor in part.items()}
