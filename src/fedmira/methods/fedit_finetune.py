"""FedIT, then every client fine-tunes the shared adapter on its own rows.

The simplest way to a personal adapter.

With N the rounds of a run and F those for fine-tuning:

    rounds 1 .. N - F:        w    <-  sum_k n_k / n  w_k
    rounds N - F + 1 .. N:    v_k  <-  v_k as trained by client k, which begins with v_k = w

The first is FedAvg over LoRA factors (FedIT, arXiv 2305.05644); in the second nothing is averaged.

The steps of a run are those of any other method: the fine-tuning takes rounds from FedIT instead of
adding to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from fedmira.adapters import Adapter, replaced
from fedmira.config.methods import Need
from fedmira.config.section import setting
from fedmira.errors import ConfigError
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import (
    Combined,
    Method,
    ServerState,
    Trained,
)
from fedmira.methods.parts.averaging import COMMON, mean_of
from fedmira.methods.parts.partly_sent import PartlySent

__all__ = ["FedItFinetune"]

ROUND, FINETUNE = "round", "finetune"


class FedItFinetune(Method):
    """The state holds the shared adapter and the copies of clients that fine-tuned theirs.

    The number "round" is the last round.

    The copies stay with their clients: they are no part of the bytes that are counted.
    """

    name: ClassVar[str] = "fedit-finetune"
    title: ClassVar[str] = "FedIT + fine-tuning"
    takes_newcomers: ClassVar[bool] = True
    searched: ClassVar[Mapping[str, tuple[Any, ...]]] = {"finetune_share": (0.25, 0.5, 0.75)}
    uses_graph: ClassVar[bool] = False
    averages: ClassVar[bool] = True
    partly_sent: ClassVar[bool] = True
    always_needs: ClassVar[Mapping[Need, str]] = {Need.ONE_RANK: ""}
    finetune_share: float = setting(
        0.5,
        gt=0,
        lt=1,
        help=(
            "share of the rounds for fine-tuning, the last ones, rounded down; each part has at "
            "least one round"
        ),
    )

    @property
    def shared_rounds(self) -> int:
        """N - F: rounds of FedIT."""
        rounds = self.context.rounds
        return rounds - max(1, int(self.finetune_share * rounds))

    def check(self) -> None:
        """There must be at least one round for each part.

        Raises:
            ConfigError: there are fewer than two rounds.
        """
        if self.context.rounds < 2:
            raise ConfigError(
                f"{self.name}: rounds.count is {self.context.rounds}; needs at least 2, one for "
                "FedIT and one for fine-tuning (raise rounds.count, or set algorithm.name to "
                "'fedavg')"
            )

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The start that all clients have in common."""
        return ServerState(
            {COMMON: next(iter(starts.values()))}, {ROUND: torch.zeros(1, dtype=torch.int64)}
        )

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """The shared adapter, or in fine-tuning the client's own copy, once it has one."""
        adapter = {"adapter": self.adapter_for(state, client)}
        if int(state.numbers[ROUND]) < self.shared_rounds:
            return Payload(adapter)
        return PartlySent(
            adapter, {FINETUNE: 1.0}, sent={} if client in state.adapters else adapter
        )

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Average the replies by training rows, or in fine-tuning keep what each client trained."""
        number = replies[0].round
        if number > self.shared_rounds:
            changes: dict[str, Adapter] = {
                reply.client_id: reply.payload.tensors["adapter"] for reply in replies
            }
        else:
            changes = {COMMON: mean_of(replies, self.context.server)}
        return Combined(
            ServerState(
                replaced(state.adapters, changes), {**state.numbers, ROUND: torch.tensor([number])}
            )
        )

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """The client's own copy, or the shared adapter where it has none."""
        return state.adapters[client if client in state.adapters else COMMON]

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send the shared adapter; of a copy in fine-tuning nothing travels."""
        adapter = {"adapter": trained.adapter}
        return PartlySent(adapter, sent={} if FINETUNE in payload.scalars else adapter), None
