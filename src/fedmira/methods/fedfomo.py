"""Every client measures other clients' adapters and takes what is better than its own.

It measures them on its own validation rows.

Zhang et al. 2021, "Personalized Federated Learning with First Order Model Optimization", ICLR 2021,
arXiv 2012.08565. With f_k the loss on client k's validation rows, v_k the adapter that its last
local training began with, and n over its own trained adapter and the candidates that it is sent,

    w_n    =  max(0, (f_k(v_k) - f_k(theta_n)) / |theta_n - v_k|), divided by their sum
    v_k   <-  v_k + sum_n w_n (theta_n - v_k)               unchanged where all w_n are 0

and local training begins from v_k. Updates s B A are compared and blended, exactly and cut to the
rank; the paper blends parameters.

A client reports its w_n, of which the server keeps the sum P_kn. The paper draws whom to send by P
and at random, less and less so; here half of the places, rounded up, go to the clients with the
largest P_kn, the others to those that k has not been sent yet, in turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedmira.adapters import (
    Adapter,
    gram,
    mix,
    modules,
    replaced,
)
from fedmira.config.methods import Need
from fedmira.config.section import Positive, setting
from fedmira.errors import ConfigError
from fedmira.graphs import MOST_EDGES, all_pairs
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import (
    Blend,
    Combined,
    Diagnostics,
    Method,
    ServerState,
    Start,
    Trained,
)
from fedmira.methods.parts.generalist import generalist
from fedmira.methods.parts.partly_sent import PartlySent

__all__ = ["FedFomo", "first_order_weights"]

TRAINED, PREFERENCE, SENT = "trained", "preference", "sent"
BEGAN = "began"
"""What a client keeps for itself: the adapter that its last local training began with."""


def first_order_weights(
    before: float, losses: Sequence[float], distances: Sequence[float]
) -> list[float]:
    """w_n of each adapter, 0 or more with sum 1; all 0 where none is better.

    Args:
        before: f(v).
        losses: f(theta_n); those that are not finite get weight 0.
        distances: |theta_n - v|; those of 0 get weight 0.
    """
    slopes = [
        max(0.0, before - loss) / distance if distance > 0 and math.isfinite(before - loss) else 0.0
        for loss, distance in zip(losses, distances, strict=True)
    ]
    total = sum(slopes)
    return [slope / total for slope in slopes] if total > 0 else slopes


def _place(number: int) -> str:
    """Name of a candidate, and of its weight in the reply."""
    return f"candidate {number}"


class FedFomo(Method):
    """The state holds the adapter that each client last sent.

    Its numbers stand in rows of receivers.

    "trained" (bool [K]), "preference" (float64 [K, K], P) and "sent" (bool [K, K], whom each client
    has been sent).
    """

    name: ClassVar[str] = "fedfomo"
    title: ClassVar[str] = "FedFomo"
    takes_newcomers: ClassVar[bool] = True
    searched: ClassVar[Mapping[str, tuple[Any, ...]]] = {"candidates": (2, 5, 10)}
    uses_graph: ClassVar[bool] = False
    partly_sent: ClassVar[bool] = True
    begins_elsewhere: ClassVar[bool] = True
    always_needs: ClassVar[Mapping[Need, str]] = {
        Need.ONE_RANK: "",
        Need.FACTORS: "",
        Need.FRESH_MOMENTS: (
            "algorithm.name = 'fedfomo': blended updates get new factors, to whose entries the old "
            "moments do not belong; set local.optimizer_state = 'fresh'"
        ),
        Need.VALIDATION: "",
    }
    candidates: Positive = setting(
        5,
        help=(
            "most adapters of others that a client is sent in a round. Needs "
            "`data.validation_fraction` above 0, and at most 2,000,000 pairs of clients (2,000 "
            "clients)"
        ),
    )

    def check(self) -> None:
        """Clients must be able to be blended, and what is kept of their pairs must fit.

        Raises:
            ConfigError: there is only one client, or they have too many pairs.
        """
        count, pairs = len(self.context.clients), all_pairs(len(self.context.clients))
        if pairs > MOST_EDGES:
            raise ConfigError(
                f"{self.name}: it remembers who helped whom, for {pairs:,} pairs of {count:,} "
                f"clients; at most {MOST_EDGES:,} can be held (lower data.clients, or set "
                "algorithm.name to "
                "'mira', whose learned graph keeps a few neighbours for each client)"
            )
        if count < 2:
            raise ConfigError(
                f"{self.name}: 1 client has nobody to be sent; needs at least 2 (set "
                "algorithm.name to 'local')"
            )

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """Each client's start; nobody has trained."""
        count = len(self.context.clients)
        numbers = {
            TRAINED: torch.zeros(count, dtype=torch.bool),
            PREFERENCE: torch.zeros(count, count, dtype=torch.float64),
            SENT: torch.zeros(count, count, dtype=torch.bool),
        }
        return ServerState(dict(starts), numbers)

    def joined(
        self,
        state: ServerState,
        starts: Mapping[ClientId, Adapter],
        newcomers: Sequence[ClientId],
    ) -> ServerState:
        """A newcomer begins from the mean of those that have trained."""
        grown, clients = super().joined(state, starts, newcomers), self.context.clients
        trained = [clients[k] for k in torch.nonzero(grown.numbers[TRAINED]).flatten().tolist()]
        means = {
            client: generalist(
                self.context, state.adapters, trained, client, starts[client], products=True
            )
            for client in newcomers
        }
        return ServerState(replaced(grown.adapters, means), grown.numbers)

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """The client's own adapter, which it has once it trained, and what travels: candidates."""
        own = {"adapter": state.adapters[client]}
        k = self.context.clients.index(client)
        others = {
            _place(number): state.adapters[self.context.clients[other]]
            for number, other in enumerate(self._candidates(state.numbers, k))
        }
        return PartlySent(
            {**own, **others}, sent=others if bool(state.numbers[TRAINED][k]) else own
        )

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Keep what each client trained, and what it thought of its candidates."""
        clients = self.context.clients
        numbers = {name: number.clone() for name, number in state.numbers.items()}
        logged = {}
        for reply in replies:
            k, weights = clients.index(reply.client_id), reply.payload.scalars
            for number, other in enumerate(self._candidates(state.numbers, k)):
                numbers[PREFERENCE][k, other] += weights.get(_place(number), 0.0)
                numbers[SENT][k, other] = True
            numbers[TRAINED][k] = True
            logged[reply.client_id] = {"pull": sum(weights.values())}
        changes = {reply.client_id: reply.payload.tensors["adapter"] for reply in replies}
        return Combined(
            ServerState(replaced(state.adapters, changes), numbers), Diagnostics(clients=logged)
        )

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """The adapter that the client last trained."""
        return state.adapters[client]

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Start from the blend of what is better than the last start.

        From the own adapter where nothing was sent or can be measured.
        """
        own, others = payload.tensors["adapter"], self._others(payload)
        before = memory.tensors.get(BEGAN) if memory is not None else None
        if before is None or not others:
            return Start(own)
        return Start(
            own,
            blend=Blend(
                [before, *others], lambda losses: self._blend(before, [own, *others], losses)
            ),
        )

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send the trained adapter and the weights of the candidates.

        Keep what training began with.
        """
        start = self.begin(payload, memory)
        began, weights = start.adapter, {}
        if start.blend is not None and trained.losses:
            began = start.blend.into(trained.losses)
            before, *others = start.blend.candidates
            found = self._weights(before, [start.adapter, *others], trained.losses)[1:]
            weights = {_place(number): weight for number, weight in enumerate(found)}
        return Payload({"adapter": trained.adapter}, weights), Payload({BEGAN: began})

    def _others(self, payload: Payload) -> list[Adapter]:
        """The candidates, in the order of the server."""
        return [payload.tensors[_place(number)] for number in range(len(payload.tensors) - 1)]

    def _weights(
        self, before: Adapter, adapters: Sequence[Adapter], losses: Sequence[float]
    ) -> list[float]:
        """w_n of the own adapter and the candidates.

        Losses are of the own adapter, of `before`, and of the candidates.
        """
        own, base, *others = losses
        products = gram([before, *adapters], [1.0] * (len(adapters) + 1))
        squared = products[0, 0] + products.diagonal()[1:] - 2 * products[0, 1:]
        return first_order_weights(base, [own, *others], squared.clamp_min(0).sqrt().tolist())

    def _blend(
        self, before: Adapter, adapters: Sequence[Adapter], losses: Sequence[float]
    ) -> Adapter:
        """sum_n w_n of the updates at the client's rank; `before` where nothing is better."""
        weights = self._weights(before, adapters, losses)
        if not any(weights):
            return before
        rank = next(iter(modules(before).values()))[0].shape[0]
        return mix(adapters, weights, [1.0] * len(adapters), rank, 1.0, adapters[0]).adapter

    def _candidates(self, numbers: Mapping[str, Tensor], k: int) -> list[int]:
        """Whom client k is sent.

        The most preferred for half of the places, then new ones in turn, then the next most
        preferred.
        """
        count = len(self.context.clients)
        if not bool(numbers[TRAINED][k]):
            return []
        trained, preference, sent = (
            numbers[TRAINED].tolist(),
            numbers[PREFERENCE][k].tolist(),
            numbers[SENT][k].tolist(),
        )
        ready = [(k + step) % count for step in range(1, count) if trained[(k + step) % count]]
        preferred = sorted(ready, key=lambda other: -float(preference[other]))
        liked = [other for other in preferred if preference[other] > 0]
        new = [other for other in ready if not sent[other]]
        order = dict.fromkeys([*liked[: (self.candidates + 1) // 2], *new, *preferred])
        return list(order)[: self.candidates]
