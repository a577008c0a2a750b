"""FedAvg whose server steps by an optimizer of its own: momentum, Adam, Yogi or Adagrad.

Reddi et al. 2021, "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295 (FedAdam, FedYogi,
FedAdagrad); with momentum it is FedAvgM (Hsu et al. 2019, arXiv 1909.06335). The server takes what
a round changed for a gradient. With w the shared adapter, entry by entry:

    D  =   sum_k n_k / n  w_k  -  w                  over the clients of the round
    m  <-  beta1 m + (1 - beta1) D                   m = 0 before round 1
    v  <-  beta2 v + (1 - beta2) D^2                 adam;  v = tau^2 before round 1
    v  <-  v - (1 - beta2) D^2 sign(v - D^2)         yogi
    v  <-  v + D^2                                   adagrad
    w  <-  w + rate m / (sqrt(v) + tau)              momentum: w + rate m

There is no bias correction, as in the paper. Hsu et al. write m <- beta m + D and w <- w + m: the
same path as with rate 1 / (1 - beta) here. With momentum 0 and rate 1 it is FedAvg, bit for bit.
The paper weighs clients alike or by rows; here it is by rows, as in FedAvg. m and v stay with the
server, so that messages are FedAvg's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from fedmira.adapters import Adapter, map_tensors, replaced, weighted_sum
from fedmira.config.section import setting
from fedmira.messages import ClientId, Reply
from fedmira.methods.base import Combined, ServerState
from fedmira.methods.fedavg import SHARED, FedAvg
from fedmira.methods.parts.averaging import mean_of

__all__ = ["FedOpt"]

FIRST, SECOND = "*first-moment", "*second-moment"
"""In states: m and v. The star is in no client's id."""
ADAPTIVE = ("adam", "yogi", "adagrad")
ADAPTIVE_RATE = 0.03
"""`server_rate` of these where it is not set."""
_READERS = {"server_memory": ("adam", "yogi"), "server_floor": ADAPTIVE}


class FedOpt(FedAvg):
    """The state holds the shared adapter and, in its shapes, m and v; momentum has no v."""

    name: ClassVar[str] = "fedopt"
    averages: ClassVar[bool] = True
    sends_mean_alone: ClassVar[bool] = True
    title: ClassVar[str] = "FedOpt"
    takes_newcomers: ClassVar[bool] = True
    server_optimizer: Literal["momentum", "adam", "yogi", "adagrad"] = setting(
        "adam",
        help=(
            "how the server steps along what a round changed: `momentum` is FedAvgM, `adam` "
            "FedAdam, `yogi` FedYogi, `adagrad` FedAdagrad"
        ),
    )
    server_rate: float | None = setting(
        None,
        gt=0,
        help=(
            "the server's step. Not set: 1 / (1 - server_momentum) with `momentum`, which is "
            "FedAvgM as published, and 0.03 with the others, which move an entry by about the rate "
            "in a round, however far the clients went"
        ),
    )
    server_momentum: float = setting(
        0.9,
        ge=0,
        lt=1,
        help="beta1, what is kept of the running mean of changes from round to round",
    )
    server_memory: float = setting(
        0.99,
        ge=0,
        lt=1,
        help=(
            "beta2, what is kept of the running mean of squared changes. Of `adam` and `yogi`; "
            "another value beside the others is an error"
        ),
    )
    server_floor: float = setting(
        1e-3,
        gt=0,
        help=(
            "tau, added to the root of the squared changes: entries that change by less in a round "
            "move in proportion to their change. Beside `momentum`, which has none, another value "
            "is an error"
        ),
    )

    @model_validator(mode="after")
    def _settings_are_read(self) -> FedOpt:
        for key, readers in _READERS.items():
            value = getattr(self, key)
            if (
                self.server_optimizer not in readers
                and value != type(self).model_fields[key].default
            ):
                named = " or ".join(repr(reader) for reader in readers)
                raise ValueError(
                    f"{key} = {value:g}: server_optimizer = {self.server_optimizer!r} does not "
                    f"read it; leave it out, or set server_optimizer to {named}"
                )
        return self

    @property
    def rate(self) -> float:
        """The server's step, as set or by the optimizer."""
        if self.server_rate is not None:
            return self.server_rate
        whole = 1 / (1 - self.server_momentum)
        return whole if self.server_optimizer == "momentum" else ADAPTIVE_RATE

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The start that all clients have in common, m = 0 and v = tau^2."""
        state = super().initial_state(starts)
        shared = state.adapters[SHARED]
        moments = {FIRST: map_tensors(torch.zeros_like, shared)}
        if self.server_optimizer in ADAPTIVE:
            moments[SECOND] = map_tensors(
                lambda tensor: torch.full_like(tensor, self.server_floor**2), shared
            )
        return ServerState({**state.adapters, **moments}, state.numbers)

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Step from the shared adapter along the round's mean change, by the optimizer."""
        before, first, mean = (
            state.adapters[SHARED],
            state.adapters[FIRST],
            mean_of(replies, self.context.server),
        )
        beta, rate = self.server_momentum, self.rate
        changes: dict[str, Adapter] = {
            FIRST: weighted_sum([first, mean, before], [beta, 1 - beta, beta - 1])
        }
        if self.server_optimizer == "momentum":
            # Written so that the mean itself is left where beta = 0 and rate = 1, to the last bit.
            fresh = rate * (1 - beta)
            changes[SHARED] = weighted_sum([before, mean, first], [1 - fresh, fresh, rate * beta])
        else:
            changes[SECOND] = map_tensors(self._second, state.adapters[SECOND], mean, before)
            changes[SHARED] = map_tensors(self._moved, before, changes[FIRST], changes[SECOND])
        return Combined(ServerState(replaced(state.adapters, changes), state.numbers))

    def _second(self, second: Tensor, mean: Tensor, before: Tensor) -> Tensor:
        """v after the round."""
        v, kept = second.double(), self.server_memory
        squared = (mean.double() - before.double()).square()
        if self.server_optimizer == "adagrad":
            v = v + squared
        elif self.server_optimizer == "adam":
            v = kept * v + (1 - kept) * squared
        else:
            v = v - (1 - kept) * squared * torch.sign(v - squared)
        return v.to(second.dtype)

    def _moved(self, before: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """w + rate m / (sqrt(v) + tau)."""
        step = first.double() / (second.double().sqrt() + self.server_floor)
        return (before.double() + self.rate * step).to(before.dtype)
