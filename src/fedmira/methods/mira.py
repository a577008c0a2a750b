"""MIRA: every client keeps its own adapter, and a task graph pulls related clients together.

Elbakary et al., "MIRA: A Method of Federated Multi-Task Learning for Large Language Models", IEEE
Networking Letters 2025, arXiv 2410.15524, equation 8, with gamma = eta * lambda:

    w_k  <-  w_k - gamma * sum_l a_kl (w_k - w_l)    for clients k of the round, from one snapshot

Ours beyond the paper: a learned graph, size-aware steps, neighbours that are not in the round,
mixing the products B A exactly in place of the factors one by one, which also lets clients have
different ranks, and a safeguard: each client may decline its pull.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from fedmira.adapters import (
    Adapter,
    distance,
    dot_products,
    gram,
    modules,
    product_norm,
    replaced,
    subtract,
)
from fedmira.config.methods import Need
from fedmira.config.section import Fraction, setting
from fedmira.errors import ConfigError
from fedmira.graphs import Graph
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import Combined, Diagnostics, ServerState
from fedmira.methods.parts.declining import MayDecline
from fedmira.methods.parts.generalist import generalist
from fedmira.methods.parts.kept_products import KeptProducts, Take, Taken
from fedmira.methods.parts.learning import Learning
from fedmira.methods.parts.mixing import Mixing, comparable_weights, mixing_matrix
from fedmira.methods.parts.spaces import MIX

__all__ = ["Mira"]

LAST_ROUND = "last_round"
START = "*start"
"""In states of adapters that are no LoRA factors.

What everybody started from. The star cannot be part of a client id.
"""


@dataclass(frozen=True, slots=True)
class _Move:
    """A client that is moved: what it trained and what it becomes.

    Beside them stand the norm that its rank could not hold, whether it must differ, and the share
    of others in it.
    """

    before: Adapter
    after: Adapter
    tail: float
    neighbours_differ: bool
    pull: float


class Mira(MayDecline):
    """Both halves; with the safeguard a client also remembers the adapter it last sent.

    The state holds an adapter a client, and as numbers "last_round" (int64 [K], 0 = never trained),
    what `KeptProducts` keeps of the adapters that have trained so that a round reads few of them,
    and "graph" (float64 [E, 3], the edges that a learned graph remembers). Updates s B A are zero
    at the start; of adapters of other kinds the update is the way from the start, which the state
    holds too.
    """

    name: ClassVar[str] = "mira"
    title: ClassVar[str] = "MIRA"
    takes_newcomers: ClassVar[bool] = True
    moves_towards: ClassVar[bool] = True
    searched: ClassVar[Mapping[str, tuple[Any, ...]]] = {"coupling": (0.25, 0.5, 1.0)}
    controls: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "shuffled": {"graph.shuffled": True}  # none is "alone": who is not pulled keeps its factors
    }
    coupling: Fraction = setting(
        1.0,
        help="kappa = gamma · largest degree of the graph. 0 is local training",
    )
    server_step: float | None = setting(
        None,
        ge=0,
        help=(
            "gamma = eta · lambda of the paper itself, in place of `coupling`. Setting both is "
            "an error"
        ),
    )
    size_scale: float = setting(
        64.0,
        ge=0,
        help=(
            "a client with n training rows moves by size_scale / (size_scale + n) of the step. "
            "0 switches this off"
        ),
    )
    neighbours: Literal["fresh", "rescaled", "stale"] = setting(
        "stale",
        help=(
            "who pulls: the clients of this round; the same with an unbiased factor; every "
            "client that ever trained"
        ),
    )
    space: Literal["product", "factor"] = setting(
        "product",
        help=(
            "mix the products B A and cut to the receiver's rank, or mix A and B one by one as "
            "in the paper"
        ),
    )

    @model_validator(mode="after")
    def _one_strength(self) -> Mira:
        if self.server_step is not None and "coupling" in self.model_fields_set:
            raise ValueError(
                "coupling and server_step say the same thing in two ways; set one of them"
            )
        return self

    @model_validator(mode="after")
    def _something_to_decline(self) -> Mira:
        if self.safeguard and self.strength == 0:
            raise ValueError(
                "safeguard = true, but with coupling or server_step 0 nobody is pulled; set "
                "safeguard = false, or a strength above 0"
            )
        return self

    @property
    def strength(self) -> float:
        """The coupling, or the server step that stands in its place."""
        return self.coupling if self.server_step is None else self.server_step

    @property
    def needs(self) -> Mapping[Need, str]:
        """Products are of two factors, and get new ones; the safeguard needs validation rows."""
        found: dict[Need, str] = {}
        if self.space == "product":
            found[Need.FRESH_MOMENTS] = (
                "algorithm.space = 'product': mixed products get new factors, to whose entries the "
                "old moments do not belong; set algorithm.space = 'factor' or "
                "local.optimizer_state = 'fresh'"
            )
            found[Need.FACTORS] = (
                "algorithm.space = 'product', which mixes products of LoRA's factors; set "
                "algorithm.space = 'factor', which mixes the adapters entry by entry, or "
                "adapter.kind = 'lora'"
            )
        if self.safeguard:
            found[Need.VALIDATION] = "algorithm.safeguard = true"
        return found

    def check(self) -> None:
        """The settings must be able to act on this federation.

        Raises:
            ConfigError: alignment is on and could never move anything (a cohort of one without
                stale neighbours, a graph without edges, a single client), or factors of different
                ranks would be mixed; all of these together.
        """
        graph, count = self.context.graph, len(self.context.clients)
        edges = graph.graph(graph.initial(self.context.clients), self.context.clients).edge_list
        strength = self.strength
        problems = []
        if strength > 0 and self.context.cohort == 1 and self.neighbours != "stale":
            problems.append(
                "mira: 1 client a round has no neighbours when algorithm.neighbours = "
                f"{self.neighbours!r}; needs at least 2 "
                "(set it to 'stale', or raise rounds.participation)"
            )
        if strength > 0 and graph.learned and count < 2:
            problems.append(
                f"mira: a graph of {count} client has no edge, so alignment cannot act; needs "
                "at least 2 "
                "(set algorithm.name to 'local', or algorithm.coupling to 0)"
            )
        if strength > 0 and not graph.learned and len(edges) == 0:
            problems.append(
                f"mira: the graph of {count} clients has no edge, so alignment cannot act; "
                "needs at least 1 "
                "(choose another graph.kind, or set algorithm.coupling to 0)"
            )
        unequal = self.context.unequal_ranks()
        if self.space == "factor" and unequal is not None:
            one, other = unequal
            problems.append(
                f"mira: client {one!r} has rank {self.context.ranks[one]} and client {other!r} "
                f"rank {self.context.ranks[other]}; factors of different "
                "ranks cannot be mixed (set algorithm.space to 'product')"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def aligns(self) -> bool:
        """Whether the coupling is above 0."""
        return self.strength > 0

    @property
    def _learning(self) -> Learning:
        return Learning(self.context)

    @property
    def _kept(self) -> KeptProducts:
        """Inner products of the space that is mixed, and of the one that a graph is learned in."""
        spaces = {str(self.space), self._learning.compared or self.space}
        return KeptProducts(tuple(sorted(spaces)), self.context.graph.sketch)

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """Each client's start, nobody trained, no graph learned."""
        clients = self.context.clients
        numbers = {
            LAST_ROUND: torch.zeros(len(clients), dtype=torch.int64),
            **self._kept.initial(len(clients)),
            **self._learning.initial(),
        }
        common = {} if self.context.low_rank else {START: next(iter(starts.values()))}
        return ServerState({**starts, **common}, numbers)

    def joined(
        self,
        state: ServerState,
        starts: Mapping[ClientId, Adapter],
        newcomers: Sequence[ClientId],
    ) -> ServerState:
        """A newcomer begins from the mean of those that have trained; alone, from the start."""
        grown = super().joined(state, starts, newcomers)
        if not self.aligns:
            return grown
        last = dict(zip(self.context.clients, grown.numbers[LAST_ROUND].tolist(), strict=True))
        trained = [client for client, number in last.items() if number]
        means = {
            client: generalist(
                self.context,
                state.adapters,
                trained,
                client,
                starts[client],
                products=self.space == "product",
            )
            for client in newcomers
        }
        return replace(grown, adapters=replaced(grown.adapters, means))

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """The client's own adapter."""
        return Payload({"adapter": state.adapters[client]})

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """The client's own adapter."""
        return state.adapters[client]

    def halfway(self, own: Adapter, aligned: Adapter) -> Adapter:
        """Half of the way, in the space that is mixed."""
        rank = next(iter(modules(own).values()))[0].shape[0] if self.space == "product" else 0
        # Both have the client's own scale, so that it does not matter here.
        return MIX[self.space](([own, aligned], [1.0, 1.0]), [0.5, 0.5], rank, 1.0, own)[0]

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Write the replies in, learn the graph, and move the round's clients to their neighbours.

        Only the adapters of these clients and their neighbours are read; with exact inner products,
        also those of all that have trained. The logged disagreement is an estimate where inner
        products are sketched; all else that is logged is exact.
        """
        clients, kept = self.context.clients, self._kept
        row = {client: k for k, client in enumerate(clients)}
        cohort = sorted(row[reply.client_id] for reply in replies)
        changes = {reply.client_id: reply.payload.tensors["adapter"] for reply in replies}
        take = partial(self._taken, state.adapters, changes)
        last_round = state.numbers[LAST_ROUND].clone()
        last_round[cohort] = replies[0].round
        trained = last_round > 0
        numbers = {**state.numbers, LAST_ROUND: last_round, **kept.copied(state.numbers)}
        kept.refresh(numbers, cohort, trained, partial(self._updates, state.adapters, changes))
        figures = self._learning.learn(
            numbers, cohort, trained, take, partial(self._taken, state.adapters, {}), kept
        )
        graph, acts = self._learning.graph(numbers, replies[0].round)
        mixing = self._mixing(graph, cohort, trained, replies)

        laplacian = graph.among(trained).laplacian
        before = kept.of(numbers, self.space).trace(laplacian)
        moving = [k for k in cohort if float(mixing.pulls[k]) > 0]
        moves = {clients[k]: self._move(k, mixing, take, numbers, state.adapters) for k in moving}
        after = {**changes, **{client: move.after for client, move in moves.items()}}
        kept.refresh(numbers, moving, trained, partial(self._updates, state.adapters, after))
        # Asked for anew after the refresh, which writes into the kept tensors: inner products asked
        # for earlier would be a view that changes under whoever holds it.
        remaining = kept.of(numbers, self.space).trace(laplacian)
        degrees = graph.degrees
        round_log = {
            "server_step": mixing.server_step,
            "max_degree": float(degrees.max()),
            "guarded": float(mixing.guarded),
            "disagreement_before": max(0.0, before),
            "disagreement_after": max(0.0, remaining),
            **figures,
        }
        diagnostics = Diagnostics(
            round=round_log,
            clients={
                clients[k]: {
                    "pull": moves[clients[k]].pull if clients[k] in moves else 0.0,
                    "degree": float(degrees[k]),
                    **self._motion(clients[k], moves.get(clients[k]), state.adapters),
                }
                for k in cohort
            },
            graph=graph if acts else None,
            expects_motion=frozenset(
                client for client, move in moves.items() if move.neighbours_differ
            ),
        )
        return Combined(ServerState(replaced(state.adapters, after), numbers), diagnostics)

    def _taken(
        self,
        stored: Mapping[ClientId, Adapter],
        changes: Mapping[ClientId, Adapter],
        positions: Sequence[int],
    ) -> Taken:
        """The adapters at these positions, changed or as stored, with their scales."""
        clients = [self.context.clients[k] for k in positions]
        adapters = [changes[client] if client in changes else stored[client] for client in clients]
        return adapters, [self.context.scale(client) for client in clients]

    def _updates(
        self,
        stored: Mapping[ClientId, Adapter],
        changes: Mapping[ClientId, Adapter],
        positions: Sequence[int],
    ) -> Taken:
        """What inner products are taken of.

        LoRA's factors themselves, and of other adapters the way from the start.
        """
        adapters, scales = self._taken(stored, changes, positions)
        if self.context.low_rank:
            return adapters, scales
        start = stored[START]
        return [subtract(adapter, start) for adapter in adapters], scales

    def _mixing(
        self, graph: Graph, cohort: list[int], trained: Tensor, replies: Sequence[Reply]
    ) -> Mixing:
        """P of this round."""
        examples = {reply.client_id: reply.num_examples for reply in replies}
        rows = [examples.get(client, self.context.rows[client]) for client in self.context.clients]
        in_cohort = torch.zeros(len(rows), dtype=torch.bool)
        in_cohort[cohort] = True
        return mixing_matrix(
            self,
            graph,
            in_cohort,
            trained,
            torch.tensor(rows, dtype=torch.float64),
            self.context.graph.absolute,
            self.context.server.least_mixed,
        )

    def _move(
        self,
        k: int,
        mixing: Mixing,
        take: Take,
        numbers: Mapping[str, Tensor],
        stored: Mapping[ClientId, Adapter],
    ) -> _Move:
        """Client k's new adapter; `take`, `numbers` and `stored` are as before anybody moves."""
        client, space = self.context.clients[k], self.space
        positions, weights = mixing.row(k)
        taken, own = take(positions), positions.index(k)
        before = taken[0][own]
        weights, pull = self._comparable(weights, taken, own, float(mixing.pulls[k]), stored)
        if pull == 0:
            return _Move(before, before, 0.0, False, pull)
        after, tail = MIX[space](
            taken, weights, self.context.ranks[client], self.context.scale(client), before
        )

        # Whether the weighted mean of k's neighbours is another point than k itself.
        toward = torch.tensor(weights, dtype=torch.float64) / pull
        toward[own] = -1
        return _Move(
            before, after, tail, self._kept.differ(numbers, space, positions, taken, toward), pull
        )

    def _comparable(
        self,
        weights: list[float],
        taken: Taken,
        own: int,
        pull: float,
        stored: Mapping[ClientId, Adapter],
    ) -> tuple[list[float], float]:
        """The weights among updates of comparable length, and the pull that is left of them."""
        if not self.context.server.screen:
            return weights, pull
        if self.context.low_rank:
            lengths = [product_norm(*each) for each in zip(*taken, strict=True)]
        else:
            lengths = [distance(adapter, stored[START]) for adapter in taken[0]]
        kept = comparable_weights(weights, lengths, own)
        return (weights, pull) if kept == weights else (kept, 1 - kept[own])

    def _motion(
        self, client: ClientId, move: _Move | None, stored: Mapping[ClientId, Adapter]
    ) -> dict[str, float]:
        """How far a client moved.

        |moved| and |update| are norms of s B A in both spaces, so that they compare, else of all
        entries.

        Where the update is zero and the client is moved all the same, relative_pull is 1.
        """
        if move is None:
            return {"relative_pull": 0.0, "truncation": 0.0}
        pair = self._gram([move.before, move.after], self.context.scale(client), stored)
        moved = max(0.0, float(pair[0, 0] + pair[1, 1] - 2 * pair[0, 1]))
        update = float(pair[0, 0]) or moved or 1.0
        relative = math.sqrt(moved / update)
        # Factoring a product anew costs float32 rounding; that is no motion.
        return {
            "relative_pull": relative if relative > torch.finfo(torch.float32).eps else 0.0,
            "truncation": move.tail / math.sqrt(update),
        }

    def _gram(
        self, adapters: Sequence[Adapter], scale: float, stored: Mapping[ClientId, Adapter]
    ) -> Tensor:
        """Inner products of a client's updates, float64."""
        if self.context.low_rank:
            return gram(adapters, [scale] * len(adapters))
        updates = [subtract(adapter, stored[START]) for adapter in adapters]
        return dot_products(updates, updates)
