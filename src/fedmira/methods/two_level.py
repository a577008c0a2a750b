"""Two levels: what clients learn in common goes to everybody, what is a client's own to relatives.

Ours. Client k has w_k = C + O_k, a sum of LoRA products cut to its rank: C is common, O_k its own.
With u_k what its local training added, trained minus sent as products, p_k its share of the rows of
the round's clients S, m = sum_S p_l u_l, t the round and t_k the rounds that client k has trained,

    C    <-  C + b m                   b   = min(1, 2 / (t sum_S p_l^2))
    O_k  <-  O_k + a_k (u_k - m)       a_k = min(1, max(3, h T) / t_k)            for k in S
    O_k  <-  sum_l P_kl O_l            MIRA's server step on the own parts        for k in S

with T the rounds that a client of this run trains, rounds times participation, and h the horizon.
Of a newcomer the rounds are those that are left when it comes, and t_k counts its own.

With everybody in every round and a = b = 1 it is MIRA on w_k; with few clients a round C makes a
step in every round, as the shared adapter of FedIT and FlexLoRA does. Behind round h T steps shrink
so that an own part is the mean of what it would be after each later round, since a client's few
rows make each of them noisy. The sum is factored in the client's
own gauge: its last A, turned into the new row space ("turned" in `adapters.mix`).

Two controls are settings: `common_rank = 0` shares nothing in common (u_k stands in place of u_k -
m), and `coupling = 0` aligns nobody; with both it is local training with the same factors and the
same shrinking steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from fedmira.adapters import Adapter, mix, modules, replaced, sum_norm
from fedmira.adapters.low_rank import DOWN, Split
from fedmira.config.methods import Need
from fedmira.config.section import Count, Fraction, setting
from fedmira.graphs import Graph
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import Combined, Diagnostics, ServerState
from fedmira.methods.parts.averaging import COMMON, by_rows
from fedmira.methods.parts.declining import MayDecline
from fedmira.methods.parts.kept_products import KeptProducts, Taken
from fedmira.methods.parts.learning import Learning
from fedmira.methods.parts.mixing import Mixing, mixing_matrix

__all__ = ["TwoLevel"]

OWN_PART = "*own-"
"""In states, before the id of the client whose own part it is. The star is in no client's id."""
OWN_RANK = 2
"""Directions of an own part, in ranks of its client."""
LEAST_HORIZON = 3.0
"""Own steps do not shrink up to this round, in which a client is far from its end."""
COMMON_HORIZON = 2.0
"""The common step shrinks behind so many times 1 / sum p^2 rounds, as its mean settles."""
TURNS, MADE = "turns", "made"


@dataclass(frozen=True, slots=True)
class _Sum:
    """A weighted sum of LoRA products that nobody has formed yet.

    Attributes:
        adapters: of any ranks.
        weights: one number an adapter.
        scales: alpha / rank of each.
    """

    adapters: tuple[Adapter, ...] = ()
    weights: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()

    def plus(self, other: _Sum, times: float = 1.0) -> _Sum:
        """The sum with another one added so many times; an adapter of both stands in it once."""
        place = {id(adapter): i for i, adapter in enumerate(self.adapters)}
        weights, new = list(self.weights), []
        for adapter, weight, factor in zip(
            other.adapters, other.weights, other.scales, strict=True
        ):
            if id(adapter) in place:
                weights[place[id(adapter)]] += times * weight
            else:
                new.append((adapter, times * weight, factor))
        return _Sum(
            self.adapters + tuple(adapter for adapter, _, _ in new),
            tuple(weights) + tuple(weight for _, weight, _ in new),
            self.scales + tuple(factor for _, _, factor in new),
        )

    def formed(
        self, rank: int, out_scale: float, last: Adapter, split: Split = "balanced"
    ) -> Adapter:
        """The nearest adapter of a rank.

        Args:
            rank: how many directions it has.
            out_scale: its alpha / rank.
            last: the adapter that stood in its place.
            split: as in `mix`.
        """
        mixed = mix(self.adapters, self.weights, self.scales, rank, out_scale, last, split=split)
        return mixed.adapter

    @property
    def norm(self) -> float:
        """Frobenius norm over all modules."""
        return sum_norm(self.adapters, self.weights, self.scales)


@dataclass(frozen=True, slots=True)
class _Round:
    """A round as the server sees it.

    Attributes:
        number: from 1.
        cohort: positions of its clients, ascending.
        trained, sent: their adapters after local training, and before.
        added: what local training added.
        shares: of each client in all rows of the round.
        rows: training rows of each.
    """

    number: int
    cohort: list[int]
    trained: Mapping[ClientId, Adapter]
    sent: Mapping[ClientId, Adapter]
    added: Mapping[ClientId, _Sum]
    shares: Mapping[ClientId, float]
    rows: Mapping[ClientId, int]


class TwoLevel(MayDecline):
    """Server and client halves.

    The state holds for each client the adapter it was last made of, under its id, and its own part
    of twice its rank; and the common part of `common_rank` times the largest rank: 3 r a client and
    4 r for all, where MIRA holds r a client. Its numbers are "turns" (int64 [K], the rounds each
    client has trained), "made" (int64 [K + 1], the round each adapter was made in, and that of the
    common part) and those of a learned graph. Adapters of clients that were not in the last round
    are made when they are asked for.
    """

    name: ClassVar[str] = "two-level"
    title: ClassVar[str] = "two levels"
    takes_newcomers: ClassVar[bool] = True
    moves_towards: ClassVar[bool] = True
    searched: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "coupling": (0.25, 0.5, 1.0),
        "horizon": (0.5, 1.0),
    }
    controls: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "alone": {  # who is not pulled has nothing to decline
            "algorithm.coupling": 0.0,
            "algorithm.common_rank": 0,
            "algorithm.safeguard": False,
        },
        "common": {"algorithm.coupling": 0.0},
        "shuffled": {"graph.shuffled": True},
    }
    always_needs: ClassVar[Mapping[Need, str]] = {
        Need.FACTORS: "",
        Need.FRESH_MOMENTS: (
            "algorithm.name = 'two-level': sums of products get new factors, to whose entries the "
            "old moments do not belong; set local.optimizer_state = 'fresh'"
        ),
    }
    coupling: Fraction = setting(
        1.0,
        help="as MIRA's, for own parts. 0 aligns nobody",
    )
    size_scale: float = setting(
        64.0,
        ge=0,
        help=(
            "a client with n training rows is moved towards its relatives by size_scale / "
            "(size_scale + n) of the step. 0 switches this off"
        ),
    )
    horizon: float = setting(
        0.5,
        gt=0,
        le=1,
        help=(
            "h: behind this share of the rounds that a client trains, and no sooner than its "
            "third, its own steps shrink, so that the rest is averaged. 1: they never do"
        ),
    )
    common_rank: Count = setting(
        4,
        help="directions of the common part, in ranks. 0: nothing is common",
    )

    @model_validator(mode="after")
    def _something_to_decline(self) -> TwoLevel:
        if self.safeguard and self.coupling == 0 and self.common_rank == 0:
            raise ValueError(
                "safeguard = true, but with coupling 0 and common_rank 0 the server changes "
                "nothing; set safeguard = false"
            )
        return self

    @property
    def needs(self) -> Mapping[Need, str]:
        """Two factors with fresh moments; the safeguard needs validation rows."""
        more = {Need.VALIDATION: "algorithm.safeguard = true"} if self.safeguard else {}
        return {**self.always_needs, **more}

    @property
    def aligns(self) -> bool:
        """Whether the coupling is above 0."""
        return self.coupling > 0

    @property
    def server_step(self) -> float | None:
        """None: the strength is the coupling."""
        return None

    @property
    def neighbours(self) -> Literal["fresh", "rescaled", "stale"]:
        """Every client that ever trained pulls, by its own part as it is stored."""
        return "stale"

    @property
    def _learning(self) -> Learning:
        return Learning(self.context)

    @property
    def _kept(self) -> KeptProducts:
        """Inner products of own parts, where a graph is learned from them."""
        compared = self._learning.compared
        return KeptProducts((compared,) if compared else (), self.context.graph.sketch)

    @property
    def _common_rank(self) -> int:
        return self.common_rank * self.context.largest_rank

    @property
    def _common_scale(self) -> float:
        return self.context.scale_of(self._common_rank)

    def halfway(self, own: Adapter, aligned: Adapter) -> Adapter:
        """The mean of both products, in the factors of the client's own."""
        rank = next(iter(modules(own).values()))[0].shape[0]
        # Both have the client's own scale, so that it does not matter here.
        return mix([own, aligned], [0.5, 0.5], [1.0, 1.0], rank, 1.0, own, split="turned").adapter

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """Each client's start; all parts zero."""
        context = self.context
        own = {
            OWN_PART + client: _zero(start, self._own_rank(client))
            for client, start in starts.items()
        }
        widest = max(starts, key=lambda client: context.ranks[client])
        common = {COMMON: _zero(starts[widest], self._common_rank)} if self.common_rank else {}
        count = len(context.clients)
        numbers = {
            TURNS: torch.zeros(count, dtype=torch.int64),
            MADE: torch.zeros(count + 1, dtype=torch.int64),
            **self._kept.initial(count),
            **self._learning.initial(),
        }
        return ServerState({**starts, **own, **common}, numbers)

    def joined(
        self,
        state: ServerState,
        starts: Mapping[ClientId, Adapter],
        newcomers: Sequence[ClientId],
    ) -> ServerState:
        """A newcomer's own part is zero, so that it begins from C; its T are the rounds left."""
        grown, made = super().joined(state, starts, newcomers), state.numbers[MADE]
        after = torch.zeros(len(self.context.clients) + 1, dtype=torch.int64)
        after[: len(made) - 1], after[-1] = made[:-1], made[-1]
        return ServerState(grown.adapters, {**grown.numbers, MADE: after})

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """C + O_k, cut to the client's rank."""
        return Payload({"adapter": self.adapter_for(state, client)})

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """C + O_k, cut to the client's rank: as it is stored, unless C has changed since."""
        made, stored = state.numbers[MADE], state.adapters[client]
        if int(made[self.context.clients.index(client)]) == int(made[-1]):
            return stored
        whole = self._own(state, client).plus(self._common(state.adapters))
        return self._formed(whole, client, stored)

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """The common step, the own steps, and the alignment of own parts, from one snapshot."""
        clients = self.context.clients
        round_ = self._round(state, replies)
        numbers = {
            **state.numbers,
            TURNS: state.numbers[TURNS].clone(),
            MADE: state.numbers[MADE].clone(),
        }
        numbers[TURNS][round_.cohort] += 1
        numbers[MADE][[*round_.cohort, -1]] = replies[0].round
        mean, changes = self._common_step(state, round_)
        own = {
            clients[k]: self._own(state, clients[k]).plus(
                round_.added[clients[k]].plus(mean, -1.0),
                self._step(clients[k], int(numbers[TURNS][k])),
            )
            for k in round_.cohort
        }
        figures = self._learn(numbers, state, round_)
        graph, acts = self._learning.graph(numbers, round_.number)
        mixing = self._mixing(graph, round_, numbers[TURNS] > 0)
        common = self._common(changes)
        told = {}
        for k in round_.cohort:
            client = clients[k]
            total = self._mixed(state, mixing, k, own)
            rank, scale_ = self._own_rank(client), self.context.scale(client)
            part = total.formed(rank, scale_, state.adapters[OWN_PART + client], "balanced")
            changes[OWN_PART + client] = part
            whole = _Sum((part,), (1.0,), (scale_,)).plus(common)
            after = self._formed(whole, client, round_.trained[client])
            changes[client] = after
            pull = float(mixing.pulls[k])
            way = total.plus(own[client], -1.0)
            told[client] = {
                "pull": pull,
                "degree": float(graph.degrees[k]),
                "relative_pull": _share(way, _Sum((after,), (1.0,), (scale_,))) if pull else 0.0,
            }
        steps = {
            "server_step": mixing.server_step,
            "max_degree": float(graph.degrees.max()),
            "guarded": float(mixing.guarded),
        }
        diagnostics = Diagnostics({**steps, **figures}, told, graph if acts else None)
        return Combined(ServerState(replaced(state.adapters, changes), numbers), diagnostics)

    def _round(self, state: ServerState, replies: Sequence[Reply]) -> _Round:
        """What the round's clients were sent, trained and added."""
        ordered, shares = by_rows(replies)
        trained = {reply.client_id: reply.payload.tensors["adapter"] for reply in ordered}
        sent = {client: self.adapter_for(state, client) for client in trained}
        return _Round(
            number=replies[0].round,
            cohort=sorted(self.context.clients.index(client) for client in trained),
            trained=trained,
            sent=sent,
            added={
                client: _Sum((new, sent[client]), (1.0, -1.0), (self.context.scale(client),) * 2)
                for client, new in trained.items()
            },
            shares={reply.client_id: share for reply, share in zip(ordered, shares, strict=True)},
            rows={reply.client_id: reply.num_examples for reply in ordered},
        )

    def _common_step(self, state: ServerState, round_: _Round) -> tuple[_Sum, dict[str, Adapter]]:
        """m, and the common part with its step; nothing where nothing is common.

        There is no step either where a client would get a mean of too few others.
        """
        if not self.common_rank:
            return _Sum(), {}
        if 1 < self.context.server.least_mixed >= len(round_.shares):
            return _Sum(), {COMMON: state.adapters[COMMON]}
        total = _Sum()
        for client, share in round_.shares.items():
            total = total.plus(round_.added[client], share)
        before = state.adapters[COMMON]
        formed = total.formed(self._common_rank, self._common_scale, before)
        mean = _Sum((formed,), (1.0,), (self._common_scale,))
        squares = sum(share * share for share in round_.shares.values())
        step = min(1.0, COMMON_HORIZON / (round_.number * squares))
        after = self._common(state.adapters).plus(mean, step)
        return mean, {COMMON: after.formed(self._common_rank, self._common_scale, before)}

    def _step(self, client: ClientId, turn: int) -> float:
        """a_k in a client's round of this number, from 1."""
        context = self.context
        turns = context.rounds_of(client) * context.cohort / len(context.clients)
        return min(1.0, max(LEAST_HORIZON, self.horizon * turns) / turn)

    def _learn(
        self, numbers: dict[str, Tensor], state: ServerState, round_: _Round
    ) -> Mapping[str, float]:
        """Write what the round taught of the graph into the numbers; figures for the log."""
        clients, kept = self.context.clients, self._kept
        trained = numbers[TURNS] > 0

        def took(positions: Sequence[int]) -> Taken:
            ids = [clients[k] for k in positions]
            found = [round_.trained.get(client, state.adapters[client]) for client in ids]
            return found, [self.context.scale(client) for client in ids]

        def sent(positions: Sequence[int]) -> Taken:
            ids = [clients[k] for k in positions]
            return [round_.sent[client] for client in ids], [
                self.context.scale(each) for each in ids
            ]

        numbers |= kept.copied(numbers)
        if kept.spaces:
            kept.refresh(numbers, round_.cohort, trained, took)
        return self._learning.learn(numbers, round_.cohort, trained, took, sent, kept)

    def _mixing(self, graph: Graph, round_: _Round, trained: Tensor) -> Mixing:
        """P of this round."""
        clients = self.context.clients
        rows = [round_.rows.get(client, self.context.rows[client]) for client in clients]
        cohort = torch.zeros(len(clients), dtype=torch.bool)
        cohort[round_.cohort] = True
        return mixing_matrix(
            self,
            graph,
            cohort,
            trained,
            torch.tensor(rows, dtype=torch.float64),
            self.context.graph.absolute,
            self.context.server.least_mixed,
        )

    def _mixed(
        self, state: ServerState, mixing: Mixing, k: int, own: Mapping[ClientId, _Sum]
    ) -> _Sum:
        """sum_l P_kl O_l, with the round's clients as they are after their own steps."""
        total = _Sum()
        for position, weight in zip(*mixing.row(k), strict=True):
            client = self.context.clients[position]
            total = total.plus(own.get(client) or self._own(state, client), weight)
        return total

    def _own_rank(self, client: ClientId) -> int:
        return OWN_RANK * self.context.ranks[client]

    def _own(self, state: ServerState, client: ClientId) -> _Sum:
        return _Sum((state.adapters[OWN_PART + client],), (1.0,), (self.context.scale(client),))

    def _common(self, adapters: Mapping[str, Adapter]) -> _Sum:
        if not self.common_rank:
            return _Sum()
        return _Sum((adapters[COMMON],), (1.0,), (self._common_scale,))

    def _formed(self, whole: _Sum, client: ClientId, last: Adapter) -> Adapter:
        """The client's adapter, in the factors of what it last had."""
        return whole.formed(self.context.ranks[client], self.context.scale(client), last, "turned")


def _zero(start: Adapter, rank: int) -> dict[str, Tensor]:
    """An update of zero with so many directions, whose A repeats that of the start."""
    result = {}
    for name, tensor in start.items():
        if name.endswith(DOWN):
            result[name] = tensor.repeat(-(-rank // tensor.shape[0]), 1)[:rank].clone()
        else:
            result[name] = torch.zeros(tensor.shape[0], rank)
    return result


def _share(moved: _Sum, whole: _Sum) -> float:
    """How far a client was moved, in norms of what it became."""
    way, size = moved.norm, whole.norm
    relative = way / (size or way or 1.0)
    # Sums in another order differ by float64 rounding; that is no motion.
    return relative if relative > torch.finfo(torch.float32).eps else 0.0
