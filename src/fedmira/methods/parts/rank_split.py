"""Adapters of two parts: the first directions are trained, the others are frozen.

Together they are one LoRA adapter.

[A; C] below each other and [B  D] beside each other give B A + D C, so a plain LoRA adapter of rank
t + f holds both parts, and anything that reads LoRA adapters reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmira.adapters import Adapter
from fedmira.adapters.low_rank import DOWN
from fedmira.errors import ConfigError
from fedmira.methods.context import MethodContext

__all__ = ["RankSplit", "check_split"]


@dataclass(frozen=True, slots=True)
class RankSplit:
    """Where adapters are divided.

    Attributes:
        trained_rank: directions of the trained part; 0 takes half of an adapter's rank.
        zero_is_half: false where 0 is none at all.
    """

    trained_rank: int
    zero_is_half: bool = True

    def of(self, rank: int) -> int:
        """Directions of the trained part of an adapter of this rank."""
        return self.trained_rank or (rank // 2 if self.zero_is_half else 0)

    def trained(self, adapter: Adapter) -> Adapter:
        """The trained part, as views."""
        return {name: self._parts(name, tensor)[0] for name, tensor in adapter.items()}

    def frozen(self, adapter: Adapter) -> Adapter:
        """The frozen part, as views."""
        return {name: self._parts(name, tensor)[1] for name, tensor in adapter.items()}

    def joined(self, trained: Adapter, frozen: Adapter) -> Adapter:
        """Both parts as one adapter.

        Args:
            trained: the first directions.
            frozen: the directions behind them.
        """
        return {
            name: torch.cat([part, frozen[name]], dim=_axis(name)) for name, part in trained.items()
        }

    def still(self, gradient: Adapter, parameters: Adapter) -> Adapter:
        """A gradient hook: zeros for the frozen part.

        Args:
            gradient: of both parts together.
            parameters: of both parts; they are not read.
        """
        return self.joined(
            self.trained(gradient),
            {name: torch.zeros_like(part) for name, part in self.frozen(gradient).items()},
        )

    def _parts(self, name: str, tensor: Tensor) -> tuple[Tensor, ...]:
        rank = tensor.shape[_axis(name)]
        return torch.split(tensor, [self.of(rank), rank - self.of(rank)], dim=_axis(name))


def _axis(name: str) -> int:
    """The axis of the rank: rows of A, columns of B."""
    return 0 if name.endswith(DOWN) else 1


def check_split(
    name: str,
    trained_rank: int,
    context: MethodContext,
    key: str = "trained_rank",
    first: str = "trained",
) -> RankSplit:
    """The split, when both parts of every client's adapter have at least one direction.

    Args:
        name: the algorithm's, for the message.
        trained_rank: directions of the first part, as set.
        context: the federation.
        key: of the algorithm's settings that says so.
        first: what the first part is.

    Raises:
        ConfigError: a client's rank leaves one part empty.
    """
    split = RankSplit(trained_rank)
    client = min(context.clients, key=lambda client: context.ranks[client])
    rank = context.ranks[client]
    if not 0 < split.of(rank) < rank:
        raise ConfigError(
            f"{name}: client {client!r} has rank {rank}, of which {split.of(rank)} would "
            f"be {first}; both parts need at least 1 (raise "
            f"adapter.rank to {max(2, trained_rank + 1)} or more, or lower algorithm.{key})"
        )
    return split
