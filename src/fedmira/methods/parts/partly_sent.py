"""Payloads of which only a part travels, because the receiver has the rest or must not see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedmira.adapters import Adapter
from fedmira.messages import Payload

__all__ = ["PartlySent"]


@dataclass(frozen=True, slots=True)
class PartlySent(Payload):
    """Whole adapters, and the part of them that a network would carry.

    A run in one process hands the whole over to evaluate and save it.

    Attributes:
        sent: what travels; `tensors` may repeat it. Bytes are counted for this part alone.
    """

    sent: Mapping[str, Adapter] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of what travels, and 8 for each number."""
        return Payload(self.sent, self.scalars).num_bytes

    @property
    def dtype(self) -> str:
        """Number types of what travels."""
        return Payload(self.sent, self.scalars).dtype
