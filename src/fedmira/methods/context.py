"""What a method is built for: the federation's clients and their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedmira.adapters import scale
from fedmira.config import ServerSettings
from fedmira.errors import ConfigError
from fedmira.graphs import GraphSource
from fedmira.messages import ClientId

__all__ = ["MethodContext", "require_one_rank"]


@dataclass(frozen=True, slots=True)
class MethodContext:
    """The federation, known before round 1.

    Attributes:
        clients: all ids, in the order of the graph's rows.
        rows: training rows by client.
        ranks: LoRA rank by client; 0 for adapters of another kind.
        alpha: LoRA's alpha; a client's update is alpha / rank * B A.
        graph: who is related.
        cohort: clients that train in a round.
        rounds: of the run.
        rslora: whether a client's update is alpha / sqrt(rank) * B A.
        server: the settings of [server].
        came: newcomer -> the first round that it can train in; who is not here was there from
            round 1 on. Newcomers stand behind all others in `clients`, in the order they came.
    """

    clients: tuple[ClientId, ...]
    rows: Mapping[ClientId, int]
    ranks: Mapping[ClientId, int]
    alpha: float
    graph: GraphSource
    cohort: int
    rounds: int = 1
    rslora: bool = False
    server: ServerSettings = ServerSettings()
    came: Mapping[ClientId, int] = field(default_factory=dict)

    def rounds_of(self, client: ClientId) -> int:
        """Rounds of the run in which a client can be drawn.

        Args:
            client: its id.
        """
        return self.rounds - self.came.get(client, 1) + 1

    def scale(self, client: ClientId) -> float:
        """alpha / rank of a client, or alpha / sqrt(rank); 1 for adapters without a rank."""
        return self.scale_of(self.ranks[client])

    def scale_of(self, rank: int) -> float:
        """The same of any rank.

        Args:
            rank: 0 for adapters without one.
        """
        return scale(self.alpha, rank, self.rslora)

    @property
    def low_rank(self) -> bool:
        """Whether adapters are LoRA's factors, so that products can be made of them."""
        return self.largest_rank > 0

    @property
    def largest_rank(self) -> int:
        """The largest rank of any client."""
        return max(self.ranks[client] for client in self.clients)

    def unequal_ranks(self) -> tuple[ClientId, ClientId] | None:
        """The first client and the first of another rank, or None where all ranks are equal."""
        first = self.clients[0]
        return next(
            ((first, other) for other in self.clients if self.ranks[other] != self.ranks[first]),
            None,
        )


def require_one_rank(name: str, context: MethodContext) -> None:
    """Refuses clients of different rank.

    Args:
        name: the method's, for the message.
        context: the clients and their ranks.

    Raises:
        ConfigError: two clients differ in rank.
    """
    unequal = context.unequal_ranks()
    if unequal is not None:
        one, other = unequal
        raise ConfigError(
            f"{name}: client {one!r} has rank {context.ranks[one]} and client {other!r} "
            f"rank {context.ranks[other]}; "
            "what is averaged factor by factor needs one rank (set "
            "adapter.rank_distribution to 'one' and take them out of "
            "adapter.ranks and adapter.rank_types, or set algorithm.name to 'flexlora' or 'mira')"
        )
