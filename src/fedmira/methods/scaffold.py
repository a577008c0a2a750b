"""FedAvg whose clients correct their steps by how they differ from all clients together.

Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML
2020, arXiv 1910.06378, with its option II. With c the server's control variate, c_k the client's,
w the shared adapter and w_k what client k made of it in R local steps,

    step of client k:   w_k  <-  w_k - lr (grad f_k(w_k) - c_k + c)
    client, after it:   d_k   =  (w - w_k) / (R lr) - c,     c_k  <-  c_k + d_k
    server:             w    <-  sum_S n_k / n_S  w_k,       c    <-  c + sum_S n_k / n  d_k

n_S are the rows of the round's clients S and n those of all K clients. So c is sum_k n_k / n c_k at
all times, the gradient of what FedAvg minimizes; the paper weighs clients alike (|S| / K times the
mean of d_k), which is the same where all have equally many rows. Its server step is 1 here.

c_k is in the client's private memory, w and c go down, w_k and d_k go up: twice FedAvg's bytes.

The new c_k is the mean of the round's gradients only where a step is lr times a gradient: with
`sgd`, one rate throughout, and the same for A and B. Adam's steps have entries near lr whatever the
gradient, so that their mean would drown the gradients that it is added to; other optimizers and
rates are refused. With `local.max_grad_norm` corrected steps are clipped, and c_k is then a mean of
clipped ones: it stays bounded, and corrects less than it should.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedmira.adapters import Adapter, map_tensors, replaced, subtract, weighted_sum
from fedmira.config.methods import Need
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import Combined, GradientHook, ServerState, Start, Trained
from fedmira.methods.fedavg import SHARED, FedAvg
from fedmira.methods.parts.averaging import by_rows, mean_of

__all__ = ["Scaffold"]

CONTROL = "control"
"""Of what travels and of a client's memory: c or d_k, and c_k."""


class Scaffold(FedAvg):
    """The state holds the shared adapter and c, in its shapes."""

    name: ClassVar[str] = "scaffold"
    title: ClassVar[str] = "SCAFFOLD"
    takes_newcomers: ClassVar[bool] = True
    always_needs: ClassVar[Mapping[Need, str]] = {Need.ONE_RANK: "", Need.PLAIN_STEPS: ""}

    @property
    def returned(self) -> tuple[str, ...]:
        """d_k, by which a client's control changed."""
        return (CONTROL,)

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The start that all clients have in common, and c = 0."""
        shared = next(iter(starts.values()))
        return ServerState({SHARED: shared, CONTROL: map_tensors(torch.zeros_like, shared)})

    def joined(
        self,
        state: ServerState,
        starts: Mapping[ClientId, Adapter],
        newcomers: Sequence[ClientId],
    ) -> ServerState:
        """c is sum_k n_k / n c_k also with newcomers, whose c_k is 0: n has grown."""
        rows = self.context.rows
        new = sum(rows[client] for client in newcomers)
        control = weighted_sum([state.adapters[CONTROL]], [1 - new / sum(rows.values())])
        grown = super().joined(state, starts, newcomers)
        return ServerState(replaced(grown.adapters, {CONTROL: control}), grown.numbers)

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """The shared adapter and c."""
        return Payload({"adapter": state.adapters[SHARED], CONTROL: state.adapters[CONTROL]})

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Average the adapters by the round's rows; add the changes of c_k by all clients' rows."""
        rows = sum(self.context.rows.values())
        ordered, _ = by_rows(replies)
        control = weighted_sum(
            [state.adapters[CONTROL], *(reply.payload.tensors[CONTROL] for reply in ordered)],
            [1.0, *(self.context.rows[reply.client_id] / rows for reply in ordered)],
        )
        changes = {SHARED: mean_of(replies, self.context.server), CONTROL: control}
        return Combined(ServerState(replaced(state.adapters, changes), state.numbers))

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Start from the shared adapter, with c - c_k added to every gradient."""
        correction = subtract(payload.tensors[CONTROL], _own(payload, memory))
        return Start(payload.tensors["adapter"], _plus(correction))

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send the trained adapter and the change of c_k; keep c_k.

        Without a step nothing was learned about the gradient, and c_k stays.
        """
        own, control = _own(payload, memory), payload.tensors[CONTROL]
        change: Adapter = map_tensors(torch.zeros_like, own)
        if trained.num_steps:
            share = 1 / (trained.num_steps * trained.learning_rate)
            change = weighted_sum(
                [payload.tensors["adapter"], trained.adapter, control], [share, -share, -1.0]
            )
        return (
            Payload({"adapter": trained.adapter, CONTROL: change}),
            Payload({CONTROL: map_tensors(torch.add, own, change)}),
        )


def _own(payload: Payload, memory: Payload | None) -> Adapter:
    """c_k; 0 before the client's first round, and where it lost its memory."""
    if memory is not None and CONTROL in memory.tensors:
        return memory.tensors[CONTROL]
    return map_tensors(torch.zeros_like, payload.tensors[CONTROL])


def _plus(correction: Adapter) -> GradientHook:
    """A hook that adds the same to every gradient."""
    there: dict[str, Tensor] = {}  # where the gradient is; each copy to a device is waited for

    def corrected(gradient: Adapter, parameters: Adapter) -> Adapter:
        for name in gradient.keys() - there.keys():
            there[name] = correction[name].to(gradient[name].device)
        return {name: part + there[name] for name, part in gradient.items()}

    return corrected
