"""One shared adapter, averaged entry by entry with how surely each client's rows know an entry.

Liu et al. 2021, "A Bayesian Federated Learning Framework with Online Laplace Approximation" (FOLA),
arXiv 2102.01936. Every client's posterior is a Gaussian around what it trained, w_k, whose
precision W_k grows by the squared gradients that its n_k rows gave on the way:

    client, round t:  W_k   =  W + sum over its batches b of  |b| / n_k  g_b^2
                      grad f_k(w)  +  prior / t  W / mean(W)  (w - w_t)       is what a step follows
    server:           W     <-  sum_S n_k / n_S  W_k
                      w     <-  (e w_t + sum_S n_k / n_S  W_k w_k) / (e + W),   e = damping mean(W)

g_b is the gradient of the batch's mean loss alone, before anything is added or clipped; W and its
products are by entry, and W = 0 in round 1. With the same W_k everywhere and no damping it is the
average by rows. Each round's W begins from the one before, so it grows without end, and the prior
holds against it by 1 / t.

Two things are ours. In the authors' code e = 0 but for rounding, which makes zero of an entry that
nobody observed; of LoRA that would be all of A, whose gradient is zero while B is. Here such an
entry stays at w_t. And the prior's W is divided by its mean, so that `prior` has a scale that does
not depend on the base: squared gradients of an entry are around 1e-5, which Adam would not notice.

w and W travel both ways, twice FedAvg's bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedmira.adapters import Adapter, map_tensors, replaced
from fedmira.config.methods import Need
from fedmira.config.section import setting
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import Combined, Diagnostics, GradientHook, ServerState, Start, Trained
from fedmira.methods.fedavg import SHARED, FedAvg
from fedmira.methods.parts.averaging import by_rows

__all__ = ["Fola"]

PRECISION = "precision"
"""Of the state and of what travels: W and W_k, in the shapes of the adapter."""
ROUND = "round"
"""Of the state the rounds that were combined, of a request t."""


class Fola(FedAvg):
    """The state holds the shared adapter, W in its shapes, and the number of combined rounds."""

    name: ClassVar[str] = "fola"
    title: ClassVar[str] = "FOLA"
    takes_newcomers: ClassVar[bool] = True
    always_needs: ClassVar[Mapping[Need, str]] = {Need.ONE_RANK: "", Need.GRADIENTS: ""}
    squared_parts: ClassVar[tuple[str, ...]] = (PRECISION,)
    searched: ClassVar[Mapping[str, tuple[Any, ...]]] = {"prior": (0.001, 0.01, 0.1)}
    prior: float = setting(
        0.01,
        ge=0,
        help=(
            "pull of local steps towards the shared adapter, on an entry of mean precision in the "
            "first round; round t has 1 / t of it"
        ),
    )
    damping: float = setting(
        0.01,
        ge=0,
        help=(
            "precision of the adapter that the round began with, as a share of the mean precision "
            "of all entries: entries that hardly anybody observed stay near it"
        ),
    )

    @property
    def returned(self) -> tuple[str, ...]:
        """The precision W_k that a client saw in its rows."""
        return (PRECISION,)

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The start that all clients have in common, and nothing observed."""
        shared = next(iter(starts.values()))
        adapters = {SHARED: shared, PRECISION: map_tensors(torch.zeros_like, shared)}
        return ServerState(adapters, {ROUND: torch.zeros((), dtype=torch.int64)})

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """The shared adapter, W, and t."""
        return Payload(
            {"adapter": state.adapters[SHARED], PRECISION: state.adapters[PRECISION]},
            {ROUND: float(state.numbers[ROUND]) + 1},
        )

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """The product of the clients' Gaussians; the log has the share of unobserved entries."""
        ordered, shares = by_rows(replies)
        before = state.adapters[SHARED]
        # Rounding of messages in few bits may have left a precision just below 0.
        each = [map_tensors(_at_least_zero, reply.payload.tensors[PRECISION]) for reply in ordered]
        precision = {
            name: sum(
                (share * own[name] for share, own in zip(shares, each, strict=True)),
                torch.zeros_like(tensor, dtype=torch.float64),
            )
            for name, tensor in before.items()
        }
        damping = self.damping * _mean(precision)
        merged = {}
        for name, tensor in before.items():
            weighted = damping * tensor.double()
            for share, own, reply in zip(shares, each, ordered, strict=True):
                weighted += share * own[name] * reply.payload.tensors["adapter"][name].double()
            total = damping + precision[name]
            merged[name] = torch.where(total > 0, weighted / total, tensor.double()).float()
        changes = {SHARED: merged, PRECISION: map_tensors(Tensor.float, precision)}
        numbers = {**state.numbers, ROUND: state.numbers[ROUND] + 1}
        unobserved = sum(int((part <= damping).sum()) for part in precision.values())
        entries = sum(part.numel() for part in precision.values())
        return Combined(
            ServerState(replaced(state.adapters, changes), numbers),
            Diagnostics({"precision_mean": _mean(precision), "held_back": unobserved / entries}),
        )

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Start from the shared adapter, with the prior's pull added to every gradient."""
        adapter, precision = payload.tensors["adapter"], payload.tensors[PRECISION]
        mean = _mean(precision)
        if self.prior == 0 or mean <= 0:
            return Start(adapter, squares=True)
        strength = self.prior / payload.scalars[ROUND] / mean
        pull = map_tensors(lambda part: strength * _at_least_zero(part).float(), precision)
        return Start(adapter, _towards(adapter, pull), squares=True)

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send the trained adapter and W_k, which is W where nothing was observed."""
        observed, before = trained.squares, payload.tensors[PRECISION]
        precision = before if observed is None else map_tensors(torch.add, before, observed)
        return Payload({"adapter": trained.adapter, PRECISION: precision}), None


def _at_least_zero(part: Tensor) -> Tensor:
    return part.double().clamp_min(0)


def _mean(precision: Adapter) -> float:
    """Over all entries of all tensors."""
    total = sum(float(part.sum(dtype=torch.float64)) for part in precision.values())
    return total / sum(part.numel() for part in precision.values())


def _towards(centre: Adapter, strengths: Adapter) -> GradientHook:
    """A hook that adds strength times the way from a centre, entry by entry."""
    there: dict[str, tuple[Tensor, Tensor]] = {}  # where the gradient is; each copy is waited for

    def pull(gradient: Adapter, parameters: Adapter) -> Adapter:
        for name in gradient.keys() - there.keys():
            device = gradient[name].device
            there[name] = centre[name].to(device), strengths[name].to(device)
        return {
            name: part + there[name][1] * (parameters[name] - there[name][0])
            for name, part in gradient.items()
        }

    return pull
