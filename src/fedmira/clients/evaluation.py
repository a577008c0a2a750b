"""What evaluation is: who asks for a client's losses and scores need not have its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

from fedmira.adapters import Adapter
from fedmira.data import ClientSummary
from fedmira.messages import ClientId, Failure
from fedmira.metrics import TokenLoss

__all__ = ["Evaluation", "SplitName"]

SplitName = Literal["test", "validation", "train"]


class Evaluation(Protocol):
    """Measures each client's own adapter on its own rows, wherever they are."""

    @property
    def parties(self) -> Mapping[ClientId, ClientSummary]:
        """What each client says of itself."""
        ...

    def losses(
        self, adapters: Mapping[ClientId, Adapter], split: SplitName = "test"
    ) -> dict[ClientId, TokenLoss]:
        """The response loss of each given client's adapter on its rows of `split`.

        Clients without such rows are left out.
        """
        ...

    def chosen(
        self, clients: Sequence[ClientId], candidates: Callable[[ClientId], Mapping[float, Adapter]]
    ) -> dict[ClientId, float]:
        """The key of the candidate with the lowest loss on each client's validation rows.

        Clients with one candidate are left out.
        """
        ...

    def text_scores(
        self, adapters: Mapping[ClientId, Adapter], max_new_tokens: int
    ) -> dict[ClientId, dict[str, float]]:
        """Rouge-L in both dialects and exact match of each given client's generations against its references."""
        ...

    def unmeasured(self) -> list[Failure]:
        """Clients that could not be asked since this was called last, and why.

        Always empty where all rows are in this process.
        """
        ...
