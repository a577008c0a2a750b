"""What travels between the server and its clients, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedmira.adapters import Adapter

__all__ = ["ClientId", "Failure", "Payload", "Reply", "Request"]

ClientId = str


@dataclass(frozen=True, slots=True)
class Payload:
    """Named adapters and named numbers."""

    tensors: Mapping[str, Adapter]
    scalars: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as they are stored, and 8 for each number."""
        return sum(t.numel() * t.element_size() for a in self.tensors.values() for t in a.values()) + 8 * len(self.scalars)


@dataclass(frozen=True, slots=True)
class Request:
    """Server to client: train in this round from this payload."""

    client_id: ClientId
    round: int
    seed: int
    payload: Payload


@dataclass(frozen=True, slots=True)
class Reply:
    """Client to server: what local training made of it."""

    client_id: ClientId
    round: int
    num_examples: int
    payload: Payload
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failure:
    """In place of a reply: what went wrong, and where ("train", "reply", ...)."""

    client_id: ClientId
    round: int
    stage: str
    reason: str
