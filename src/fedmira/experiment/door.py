"""The door of a run, through which clients come once it has begun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from fedmira.data import ClientSummary
from fedmira.messages import ClientId

__all__ = ["Door"]


class Door(Protocol):
    """Who waits to take part, and what becomes of it.

    Nothing here waits for anybody: who has not said what it is when it is looked for is looked for
    again before the next round.
    """

    def waiting(self) -> Mapping[ClientId, ClientSummary]:
        """What newcomers say of themselves, sorted by name; those whose names may join."""
        ...

    def admit(self, parties: Mapping[ClientId, ClientSummary]) -> None:
        """From now on these are clients of the run.

        Args:
            parties: newcomers, in the order in which they stand behind the others.
        """
        ...

    def dismiss(self, clients: Sequence[ClientId]) -> None:
        """Takes back what `admit` did.

        Args:
            clients: that were admitted last.
        """
        ...

    def turn_away(self, client: ClientId, reason: str) -> None:
        """Says to a newcomer why it cannot take part.

        Args:
            client: that waits.
            reason: in words; its node is told.
        """
        ...

    def turned_away(self) -> Sequence[str]:
        """Why newcomers were turned away since this was asked last, a sentence for each once."""
        ...
