"""MIRA without a server: each node mixes its own adapter with the last ones of its neighbours.

The future work of Elbakary et al., "MIRA: A Method of Federated Multi-Task Learning for Large
Language Models", IEEE Networking Letters 2025, arXiv 2410.15524. Along a given edge list, each node
sends what it trained to its neighbours, keeps the last adapter of each, and makes the step of
equation 8 itself before it trains again:

    w_k  <-  w_k - gamma_k * sum_l a_kl (w_k - w_l)        w_l as neighbour l last sent it
    w_k  <-  w_k as trained from there, which goes to the neighbours

What is between the nodes passes messages on by name, and keeps those that are not yet fetched: it
makes nothing of several adapters but what is evaluated and saved, by the node's own rule. With
everybody in every round this is the server's step of `mira` on the same graph (`neighbours =
"stale"`). With few clients a round it is another order: a node that is drawn reads what
has arrived since it last trained, as its neighbours trained it, while the server moves it right
after its own round, by what it has made of those that were not in it.

gamma and a node's own row of a_kl are known before round 1 from the edge list and its number of
rows, and travel as numbers beside the adapters. The graph must be given: one that is learned needs
somebody who compares all adapters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedmira.adapters import Adapter, gram, modules, product_norm, replaced
from fedmira.config.methods import Need
from fedmira.config.section import Fraction, setting
from fedmira.errors import ConfigError
from fedmira.graphs import Graph
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import Combined, Diagnostics, Method, ServerState, Start, Trained
from fedmira.methods.parts.kept_products import KeptProducts, Taken
from fedmira.methods.parts.mixing import Mixing, comparable_weights, mixing_matrix
from fedmira.methods.parts.partly_sent import PartlySent
from fedmira.methods.parts.spaces import MIX

__all__ = ["Gossip"]

LAST_ROUND, HELD, MESSAGES, BYTES = "last_round", "held", "messages", "bytes"
FROM, STEP, SCALE, OWN = "from ", "step ", "scale ", "own "
"""Before the name of a node: its adapter, P_kl, alpha / rank; P_kk before the own name."""
SCREEN = "screen"
"""Of a request: whether updates of another order of length are left out, as `server.screen`."""
MISSING = "missing"
"""Of a reply: neighbours whose adapters the node should have had and did not."""


class Gossip(Method):
    """The state holds what each node last sent, as a relay does until it is fetched.

    Its numbers are "last_round" and "held" (int64 [K]): the round that a node last trained in (0:
    never), and the round up to which it holds its neighbours' adapters (0: none); and "messages"
    and "bytes" (int64), the adapters that were passed on so far and their size.
    """

    name: ClassVar[str] = "gossip"
    title: ClassVar[str] = "MIRA without a server"
    takes_newcomers: ClassVar[bool] = True
    partly_sent: ClassVar[bool] = True
    begins_elsewhere: ClassVar[bool] = True
    traffic_differs: ClassVar[str] = "how many neighbours a client has, and when they trained"
    always_needs: ClassVar[Mapping[Need, str]] = {Need.FACTORS: ""}
    searched: ClassVar[Mapping[str, tuple[Any, ...]]] = {"coupling": (0.25, 0.5, 1.0)}
    controls: ClassVar[Mapping[str, Mapping[str, Any]]] = {"shuffled": {"graph.shuffled": True}}
    coupling: Fraction = setting(
        1.0, help="kappa = gamma · largest degree of the graph. 0 is local training"
    )
    size_scale: float = setting(
        64.0,
        ge=0,
        help=(
            "a client with n training rows moves by size_scale / (size_scale + n) of the step. "
            "0 switches this off"
        ),
    )
    space: Literal["product", "factor"] = setting(
        "product",
        help=(
            "mix the products B A and cut to the receiver's rank, or mix A and B one by one as "
            "in the paper"
        ),
    )

    @property
    def server_step(self) -> None:
        """Not given by itself: gamma follows from the coupling."""

    @property
    def neighbours(self) -> Literal["stale"]:
        """Everybody who ever trained, as it last sent its adapter."""
        return "stale"

    @property
    def needs(self) -> Mapping[Need, str]:
        """Two factors, and fresh moments or one rank by the space."""
        if self.space == "factor":
            told = "algorithm.space = 'factor', which mixes factor by factor"
            return {**self.always_needs, Need.ONE_RANK: told}
        told = (
            "algorithm.space = 'product': mixed products get new factors, to whose entries the old "
            "moments do not belong; set algorithm.space = 'factor' or local.optimizer_state = "
            "'fresh'"
        )
        return {**self.always_needs, Need.FRESH_MOMENTS: told}

    @property
    def aligns(self) -> bool:
        """Whether the coupling is above 0."""
        return self.coupling > 0

    def check(self) -> None:
        """The graph must be given and have an edge.

        Raises:
            ConfigError: it is learned, or nobody has a neighbour.
        """
        source, clients = self.context.graph, self.context.clients
        if source.learned:
            raise ConfigError(
                f"{self.name}: a learned graph needs a server that compares all adapters (set "
                "graph.kind to 'category', 'uniform', 'random' or 'file', or algorithm.name to "
                "'mira')"
            )
        if self.aligns and len(self._graph.edge_list) == 0:
            raise ConfigError(
                f"{self.name}: the graph of {len(clients)} client{'s' if len(clients) > 1 else ''} "
                "has no edge, so nobody has a neighbour; needs at least 1 (choose another "
                "graph.kind, or set algorithm.coupling to 0)"
            )

    @property
    def _graph(self) -> Graph:
        source, clients = self.context.graph, self.context.clients
        return source.graph(source.initial(clients), clients)

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """Each node's start; nothing was sent."""
        count = len(self.context.clients)
        numbers = {name: torch.zeros(count, dtype=torch.int64) for name in (LAST_ROUND, HELD)}
        numbers |= {name: torch.zeros((), dtype=torch.int64) for name in (MESSAGES, BYTES)}
        return ServerState(dict(starts), numbers)

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """What neighbours sent since the node last trained, and its row of P.

        Its own adapter it has, once it has trained.
        """
        own, k = {"adapter": state.adapters[client]}, self.context.clients.index(client)
        if int(state.numbers[LAST_ROUND][k]) == 0:
            return Payload(own)
        mixing = self._mixing(state.numbers)
        new = {
            FROM + self.context.clients[other]: state.adapters[self.context.clients[other]]
            for other in self._new(mixing, state.numbers, k)
        }
        return PartlySent({**own, **new}, self._row(mixing, k), sent=new)

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Take in what each node sent, for its neighbours; count what was passed on to it."""
        clients, before = self.context.clients, self._mixing(state.numbers)
        numbers = {name: number.clone() for name, number in state.numbers.items()}
        missing = {}
        for reply in replies:
            k = clients.index(reply.client_id)
            missing[reply.client_id] = reply.payload.scalars.get(MISSING, 0.0)
            trained = int(state.numbers[LAST_ROUND][k]) > 0
            passed = self._new(before, state.numbers, k) if trained else []
            numbers[MESSAGES] += len(passed)
            numbers[BYTES] += sum(
                Payload({"adapter": state.adapters[clients[other]]}).num_bytes for other in passed
            )
            # What a node lost is sent again, all of it.
            numbers[HELD][k] = reply.round if trained and not missing[reply.client_id] else 0
            numbers[LAST_ROUND][k] = reply.round
        changes = {reply.client_id: reply.payload.tensors["adapter"] for reply in replies}
        after = ServerState(replaced(state.adapters, changes), numbers)
        return Combined(after, self._diagnostics(after, missing, state.numbers))

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """What the node makes of its own adapter and those of its neighbours, once it trained."""
        mix = self._mix_of(state, client, self._mixing(state.numbers))
        return state.adapters[client] if mix is None else mix.made(self.space)[0]

    def totals(self, state: ServerState) -> Mapping[str, float]:
        """Edges, and what was passed on along them in both directions."""
        edges, passed = len(self._graph.edge_list), int(state.numbers[BYTES])
        return {
            "edges": edges,
            "messages_passed_on": int(state.numbers[MESSAGES]),
            "bytes_passed_on": passed,
            "bytes_per_edge": passed / edges if edges else 0.0,
        }

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Mix the own adapter with the last ones of the neighbours."""
        own = payload.tensors["adapter"]
        return Start(self._mixed(own, payload.scalars, _known(payload, memory)))

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send what was trained; keep the neighbours' adapters, and say which are not there."""
        known = _known(payload, memory)
        missing = len(_names(payload.scalars, STEP) - known.keys())
        kept = Payload({FROM + name: adapter for name, adapter in known.items()})
        told = {MISSING: float(missing)} if missing else {}
        return Payload({"adapter": trained.adapter}, told), kept if known else None

    def _mixing(self, numbers: Mapping[str, Tensor]) -> Mixing:
        """P as it is for nodes that have trained."""
        clients, trained = self.context.clients, numbers[LAST_ROUND] > 0
        rows = torch.tensor([self.context.rows[client] for client in clients], dtype=torch.float64)
        return mixing_matrix(self, self._graph, trained, trained, rows)

    def _new(self, mixing: Mixing, numbers: Mapping[str, Tensor], k: int) -> list[int]:
        """Neighbours of node k that sent an adapter which it does not hold yet."""
        sent, held = numbers[LAST_ROUND], int(numbers[HELD][k])
        others = [other for other in mixing.row(k)[0] if other != k]
        return [other for other in others if int(sent[other]) >= max(held, 1)]

    def _row(self, mixing: Mixing, k: int) -> dict[str, float]:
        """Node k's row of P, and the scales of neighbours that have another one than it."""
        clients, numbers = self.context.clients, {SCREEN: float(self.context.server.screen)}
        for other, step in zip(*mixing.row(k), strict=True):
            name = clients[other]
            numbers[(OWN if other == k else STEP) + name] = step
            numbers[SCALE + name] = self.context.scale(name)
        return numbers

    def _at_hand(
        self, own: Adapter, numbers: Mapping[str, float], known: Mapping[ClientId, Adapter]
    ) -> _Mix | None:
        """What a node mixes, None where it has nobody to mix with.

        A neighbour whose adapter is not at hand leaves its share to the node itself, and so does
        one whose update is of another order of length, where replies are screened.
        """
        others = sorted(_names(numbers, STEP) & known.keys())
        if not others:
            return None
        (name,) = _names(numbers, OWN)
        steps = {other: numbers[STEP + other] for other in others}
        absent = _names(numbers, STEP) - known.keys()
        steps[name] = numbers[OWN + name] + sum(numbers[STEP + other] for other in sorted(absent))
        order = sorted(steps)
        adapters = [own if each == name else known[each] for each in order]
        scales, place = [numbers[SCALE + each] for each in order], order.index(name)
        weights = [steps[each] for each in order]
        if numbers.get(SCREEN):
            lengths = [product_norm(*each) for each in zip(adapters, scales, strict=True)]
            weights = comparable_weights(weights, lengths, place)
        return _Mix((adapters, scales), weights, place)

    def _mixed(
        self, own: Adapter, numbers: Mapping[str, float], known: Mapping[ClientId, Adapter]
    ) -> Adapter:
        """The step of one node."""
        mix = self._at_hand(own, numbers, known)
        return own if mix is None else mix.made(self.space)[0]

    def _mix_of(self, state: ServerState, client: ClientId, mixing: Mixing) -> _Mix | None:
        """What a node will mix, from what was sent; None before it has trained."""
        own, k = state.adapters[client], self.context.clients.index(client)
        if int(state.numbers[LAST_ROUND][k]) == 0:
            return None
        names = [self.context.clients[other] for other in mixing.row(k)[0] if other != k]
        known = {name: state.adapters[name] for name in names}
        return self._at_hand(own, self._row(mixing, k), known)

    def _diagnostics(
        self, after: ServerState, missing: Mapping[ClientId, float], before: Mapping[str, Tensor]
    ) -> Diagnostics:
        """How far nodes will go, and what was passed on in the round."""
        mixing, graph = self._mixing(after.numbers), self._graph
        degrees, told, moving = graph.degrees, {}, set()
        for client, lost in missing.items():
            mix = self._mix_of(after, client, mixing)
            told[client] = {
                "pull": mix.pull if mix else 0.0,
                "degree": float(degrees[self.context.clients.index(client)]),
                **(mix.motion(self.space) if mix else {"relative_pull": 0.0, "truncation": 0.0}),
                MISSING: lost,
            }
            if mix and mix.neighbours_differ(self.space):
                moving.add(client)
        passed = {name: float(after.numbers[name] - before[name]) for name in (MESSAGES, BYTES)}
        figures = {
            "server_step": mixing.server_step,
            "max_degree": float(degrees.max()),
            "guarded": float(mixing.guarded),
            "messages_passed_on": passed[MESSAGES],
            "bytes_passed_on": passed[BYTES],
        }
        return Diagnostics(figures, told, graph, frozenset(moving))


@dataclass(frozen=True, slots=True)
class _Mix:
    """A node's step: its own adapter among those of its neighbours, and a weight for each.

    Attributes:
        taken: the adapters with their scales, in the order of the nodes' names.
        weights: of sum 1.
        place: of the node itself.
    """

    taken: Taken
    weights: list[float]
    place: int

    @property
    def own(self) -> Adapter:
        """The node's own adapter."""
        return self.taken[0][self.place]

    @property
    def pull(self) -> float:
        """The share of the way to the neighbours' mean."""
        return 1 - self.weights[self.place]

    def made(self, space: str) -> tuple[Adapter, float]:
        """The mix at the node's rank and scale, and the norm of what the rank could not hold."""
        if self.pull == 0:
            return self.own, 0.0
        rank = next(iter(modules(self.own).values()))[0].shape[0]
        return MIX[space](self.taken, self.weights, rank, self.taken[1][self.place], self.own)

    def motion(self, space: str) -> dict[str, float]:
        """How far the node goes, by norms of s B A, as shares of its own update."""
        made, tail = self.made(space)
        pair = gram([self.own, made], [self.taken[1][self.place]] * 2)
        moved = max(0.0, float(pair[0, 0] + pair[1, 1] - 2 * pair[0, 1]))
        update = float(pair[0, 0]) or moved or 1.0
        relative = math.sqrt(moved / update)
        # Factoring a product anew costs float32 rounding; that is no motion.
        return {
            "relative_pull": relative if relative > torch.finfo(torch.float32).eps else 0.0,
            "truncation": tail / math.sqrt(update),
        }

    def neighbours_differ(self, space: str) -> bool:
        """Whether the weighted mean of the neighbours is another point than the node itself."""
        if self.pull == 0:
            return False
        toward = torch.tensor(self.weights, dtype=torch.float64) / self.pull
        toward[self.place] = -1
        # Of the adapters themselves: nothing is kept of any products.
        return KeptProducts((space,), 1).differ(
            {}, space, range(len(self.weights)), self.taken, toward
        )


def _names(numbers: Mapping[str, float], kind: str) -> set[ClientId]:
    """The nodes that numbers of a kind are of."""
    return {name.removeprefix(kind) for name in numbers if name.startswith(kind)}


def _known(payload: Payload, memory: Payload | None) -> dict[ClientId, Adapter]:
    """The neighbours' last adapters, those of a message in place of older ones."""
    parts = {**(memory.tensors if memory is not None else {}), **payload.tensors}
    return {
        name.removeprefix(FROM): adapter for name, adapter in parts.items() if name.startswith(FROM)
    }
