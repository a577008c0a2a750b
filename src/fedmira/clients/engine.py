"""What an engine is: one method that carries a round's envelopes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from fedmira.messages import (
    ClientId,
    Failure,
    Payload,
    Reply,
    Request,
)

__all__ = ["Engine"]


class Engine(Protocol):
    """Carries requests and brings replies.

    Keeps each client's private memory, which the server never sees.
    """

    def exchange(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """One reply or failure per request, in any order."""
        ...

    @property
    def memories(self) -> Mapping[ClientId, Payload]:
        """The private memories this engine stores, for the checkpoint.

        Empty where nodes keep their own.
        """
        ...

    def restore(self, memories: Mapping[ClientId, Payload]) -> None:
        """Take these memories, empty or from a checkpoint, and keep later ones in a mapping of the same kind."""
        ...
