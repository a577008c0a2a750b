"""The one seam for clients' work: train, losses, choose, score, wherever their rows are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fedmira.adapters import Adapter
from fedmira.data import ClientSummary
from fedmira.messages import ClientId, Failure, Payload, Reply, Request
from fedmira.metrics import TokenLoss

__all__ = ["Candidates", "Clients", "Measuring", "SplitName", "Work"]

SplitName = Literal["test", "validation", "train"]

Work = Literal["evaluating", "answering"]

Candidates = Callable[[ClientId], Mapping[float, Adapter]]
"""Client -> the adapters that it may choose between, by their share of the server's change."""


@dataclass(frozen=True, slots=True)
class Measuring:
    """How far a measurement is.

    Attributes:
        work: "evaluating" for losses, "answering" for generated answers.
        split: which rows.
        done: rows that are done.
        rows: all rows.
        seconds_left: about how long the others take, by their tokens; None at the beginning.
    """

    work: Work
    split: SplitName
    done: int
    rows: int
    seconds_left: float | None


class Clients(Protocol):
    """The clients of a run and all that is asked of them.

    Whoever asks need not have their rows. Each client keeps a private memory between rounds, which
    the server's half of a method never sees.
    """

    @property
    def parties(self) -> Mapping[ClientId, ClientSummary]:
        """What each client says of itself, by client id."""
        ...

    @property
    def method(self) -> object | None:
        """The method whose client half they run; None where they have it on other machines."""
        ...

    def train(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """Has the clients of a round train.

        Args:
            requests: one for each of them.

        Returns:
            One reply or failure for each request, in any order.
        """
        ...

    def losses(
        self, adapters: Mapping[ClientId, Adapter], split: SplitName = "test"
    ) -> dict[ClientId, TokenLoss]:
        """The response loss of each given client's own adapter on its own rows.

        Args:
            adapters: by client id; each is read once.
            split: which rows; clients without such rows are left out.
        """
        ...

    def choose(self, clients: Sequence[ClientId], candidates: Candidates) -> dict[ClientId, float]:
        """The candidate with the lowest loss on each client's validation rows.

        Args:
            clients: those who may choose; who has one candidate is left out.
            candidates: of equals the first is taken, and without validation rows the last.
        """
        ...

    def score(
        self, adapters: Mapping[ClientId, Adapter], max_new_tokens: int
    ) -> dict[ClientId, dict[str, float]]:
        """The text metrics of each given client's answers to its test prompts.

        Args:
            adapters: by client id; each is read once.
            max_new_tokens: longest answer in tokens.
        """
        ...

    def unmeasured(self) -> list[Failure]:
        """Clients that could not be measured since this was called last, and why."""
        ...

    @property
    def memories(self) -> Mapping[ClientId, Payload]:
        """The private memories that are kept here, for the checkpoint.

        Later rounds do not change the returned mapping.
        """
        ...

    def restore(self, memories: Mapping[ClientId, Payload]) -> None:
        """Take memories from a checkpoint, or none, and keep later ones in such a mapping."""
        ...
