"""Clients that may decline what the server made of their adapter: all of it, half, or nothing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch

from fedmira.adapters import Adapter
from fedmira.config.section import setting
from fedmira.messages import Payload
from fedmira.methods.base import Method, Start, Trained

__all__ = ["OWN", "MayDecline"]

OWN = "own"
"""What a client that may decline keeps for itself: the adapter it last sent."""


class MayDecline(Method):
    """The client half of a method with a safeguard."""

    safeguard: bool = setting(
        False,
        help=(
            "each client chooses by its own validation rows how much of the server's pull it "
            "keeps: all, half or nothing. Needs `data.validation_fraction` and a pull above 0, "
            'and `engine.wire = "float32"`'
        ),
    )

    @property
    def may_decline(self) -> bool:
        """True where `safeguard` is on."""
        return self.safeguard

    @abstractmethod
    def halfway(self, own: Adapter, aligned: Adapter) -> Adapter:
        """The adapter that is half of each, in the space that the server mixes.

        Args:
            own: the adapter that the client last sent.
            aligned: what the server made of it.
        """

    def alternatives(self, own: Adapter, aligned: Adapter) -> Mapping[float, Adapter]:
        """Half of the way that the server moved the adapter, and none of it.

        The way is that in the space that is mixed.
        """
        if not self.safeguard or all(
            torch.equal(tensor, aligned[name]) for name, tensor in own.items()
        ):
            return {}
        return {0.5: self.halfway(own, aligned), 0.0: own}

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Start from the adapter in the payload.

        With the safeguard, perhaps from one that is nearer to what the client last sent.
        """
        aligned = payload.tensors["adapter"]
        own = memory.tensors.get(OWN) if memory is not None else None
        return Start(aligned, alternatives={} if own is None else self.alternatives(own, aligned))

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send the trained adapter; with the safeguard, remember it."""
        sent = Payload({"adapter": trained.adapter})
        return sent, Payload({OWN: trained.adapter}) if self.safeguard else None
