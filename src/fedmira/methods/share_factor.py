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
from dataclasses import dataclass

import torch

from fedmira.adapters import Adapter, replaced, weighted_sum
from fedmira.adapters.low_rank import DOWN, UP
from fedmira.config.methods import ShareFactorSettings
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import (
    Combined,
    PlainClient,
    ServerState,
    Start,
    Trained,
)
from fedmira.methods.context import AlgorithmContext
from fedmira.methods.parts.averaging import COMMON, by_rows, require_one_rank
from fedmira.methods.parts.partly_sent import PartlySent

__all__ = ["ShareFactor", "build_share_factor"]

_SUFFIX = {"A": DOWN, "B": UP}


@dataclass(frozen=True, slots=True)
class ShareFactor(PlainClient):
    """The state holds the shared factor of all layers, and every client's private one.

    A run in one process keeps the private factors beside the shared one, to evaluate and save whole
    adapters; they are no part of the bytes that are counted.

    Attributes:
        settings: the [algorithm] section.
    """

    settings: ShareFactorSettings

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The common start, divided."""
        private = {client: self._private(start) for client, start in starts.items()}
        return ServerState({COMMON: self._shared(next(iter(starts.values()))), **private})

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """The shared factor."""
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
        """Send the shared factor; a frozen one is what it was, whatever weight decay did to it meanwhile."""
        adapter = (
            {**trained.adapter, **self._private(payload.tensors["adapter"])}
            if self._frozen
            else trained.adapter
        )
        return PartlySent({"adapter": adapter}, sent={"shared": self._shared(adapter)}), None

    @property
    def _frozen(self) -> bool:
        return self.settings.private_factor == "frozen"

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
            if name.endswith(_SUFFIX[self.settings.shared_factor])
        }

    def _private(self, adapter: Adapter) -> Adapter:
        return {
            name: tensor
            for name, tensor in adapter.items()
            if not name.endswith(_SUFFIX[self.settings.shared_factor])
        }


def build_share_factor(settings: ShareFactorSettings, context: AlgorithmContext) -> ShareFactor:
    """Check that one factor fits all clients.

    Raises:
        ConfigError: clients differ in rank.
    """
    require_one_rank(settings.name, context)
    return ShareFactor(settings)
