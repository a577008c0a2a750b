"""One LoRA factor is common to all clients, the other stays with its client, trained or frozen.

    shared A, B trained:    FedSA-LoRA, Guo et al. 2025, arXiv 2410.01463
    shared B, A trained:    its opposite, as argued for by Fed-ALoRA, arXiv 2509.25414
    shared B, A frozen:     FFA-LoRA, Sun et al. 2024, arXiv 2403.12313

With X the shared factor and Y the private one of each adapted layer,

    X    <-  sum_k n_k / n  X_k            over the clients of the round
    Y_k  <-  Y_k as trained by client k, or the common start where it is frozen

Only X travels, which halves the bytes or better. With a frozen Y the mean of the factors is the
factor of the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator

from fedmira.adapters import Adapter, replaced, weighted_sum
from fedmira.adapters.low_rank import DOWN, UP
from fedmira.config.methods import Need
from fedmira.config.section import setting
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import (
    Combined,
    Method,
    ServerState,
    Start,
    Trained,
)
from fedmira.methods.parts.averaging import COMMON, by_rows
from fedmira.methods.parts.partly_sent import PartlySent

__all__ = ["ShareFactor"]

_SUFFIX = {"A": DOWN, "B": UP}


class ShareFactor(Method):
    """The state holds the shared factor of all layers, and every client's private one.

    A run in one process keeps the private factors beside the shared one, to evaluate and save whole
    adapters; they are no part of the bytes that are counted.
    """

    name: ClassVar[str] = "share-factor"
    title: ClassVar[str] = "shared factor"
    takes_newcomers: ClassVar[bool] = True
    searched: ClassVar[Mapping[str, tuple[Any, ...]]] = {"shared_factor": ("A", "B")}
    uses_graph: ClassVar[bool] = False
    partly_sent: ClassVar[bool] = True
    always_needs: ClassVar[Mapping[Need, str]] = {Need.ONE_RANK: "", Need.FACTORS: ""}
    shared_factor: Literal["A", "B"] = setting(
        "A", help="the LoRA factor that all clients have in common; the other stays with its client"
    )
    private_factor: Literal["trained", "frozen"] = setting(
        "trained",
        help=(
            "whether the other factor is trained, or stays at the common start, where B is "
            "zero: only A can be frozen"
        ),
    )

    @model_validator(mode="after")
    def _something_learns(self) -> ShareFactor:
        if self.shared_factor == "A" and self.private_factor == "frozen":
            raise ValueError(
                "B is zero at the start, so a frozen B learns nothing; set shared_factor = 'B' or "
                "private_factor = 'trained'"
            )
        return self

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The common start, divided."""
        private = {client: self._private(start) for client, start in starts.items()}
        return ServerState({COMMON: self._shared(next(iter(starts.values()))), **private})

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """Send the shared factor; the other one is with the client."""
        return PartlySent(
            {"adapter": self.adapter_for(state, client)}, sent={"shared": state.adapters[COMMON]}
        )

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Average the shared factors by training rows; keep the private ones."""
        ordered, weights = by_rows(replies)
        adapters = [reply.payload.tensors["adapter"] for reply in ordered]
        changes = {
            reply.client_id: self._private(adapter)
            for reply, adapter in zip(ordered, adapters, strict=True)
        }
        changes[COMMON] = weighted_sum([self._shared(adapter) for adapter in adapters], weights)
        return Combined(ServerState(replaced(state.adapters, changes), state.numbers))

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """The client's private factor beside the shared one."""
        return {**state.adapters[COMMON], **state.adapters[client]}

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Start from both factors; a frozen one gets no gradient."""
        return Start(payload.tensors["adapter"], self._still if self._frozen else None)

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send the shared factor.

        A frozen one is what it was, whatever weight decay did to it meanwhile.
        """
        adapter = (
            {**trained.adapter, **self._private(payload.tensors["adapter"])}
            if self._frozen
            else trained.adapter
        )
        return PartlySent({"adapter": adapter}, sent={"shared": self._shared(adapter)}), None

    @property
    def _frozen(self) -> bool:
        return self.private_factor == "frozen"

    def _still(self, gradient: Adapter, parameters: Adapter) -> Adapter:
        """The gradient with zeros for the private factor."""
        return {
            **gradient,
            **{name: torch.zeros_like(part) for name, part in self._private(gradient).items()},
        }

    def _shared(self, adapter: Adapter) -> Adapter:
        return {
            name: tensor
            for name, tensor in adapter.items()
            if name.endswith(_SUFFIX[self.shared_factor])
        }

    def _private(self, adapter: Adapter) -> Adapter:
        return {
            name: tensor
            for name, tensor in adapter.items()
            if not name.endswith(_SUFFIX[self.shared_factor])
        }
