"""What travels between the server and its clients, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedmira.adapters import Adapter

__all__ = [
    "ClientId",
    "Failure",
    "Payload",
    "Reply",
    "Request",
    "Traffic",
    "Volume",
    "flat_name",
    "flattened",
    "in_parts",
]

ClientId = str
_BETWEEN = "|"


def flat_name(part: str, name: str) -> str:
    """The name of a part's tensor among those of all parts, "part|name".

    Args:
        part: of a payload, without a "|".
        name: of a tensor in that part.
    """
    return f"{part}{_BETWEEN}{name}"


def flattened(tensors: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The tensors of all parts as one adapter, the same objects under their flat names."""
    return {
        flat_name(part, name): tensor
        for part, adapter in tensors.items()
        for name, tensor in adapter.items()
    }


def in_parts(flat: Adapter, parts: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Undo `flattened`.

    Args:
        flat: tensors by flat names.
        parts: their names, none with a "|"; those without tensors come back empty.
    """
    found: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    for key, tensor in flat.items():
        part, _, name = key.partition(_BETWEEN)
        found[part][name] = tensor
    return found


@dataclass(frozen=True, slots=True)
class Payload:
    """Named adapters and named numbers.

    >>> import torch
    >>> from fedmira.messages import Payload
    >>> Payload({"adapter": {"A": torch.zeros(2, 3)}}, {"loss": 1.5}).num_bytes
    32

    Attributes:
        tensors: part, such as "adapter" -> its tensors by name.
        scalars: name -> number.
    """

    tensors: Mapping[str, Adapter]
    scalars: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as they are stored, and 8 for each number."""
        return sum(
            t.numel() * t.element_size() for a in self.tensors.values() for t in a.values()
        ) + 8 * len(self.scalars)

    @property
    def dtype(self) -> str:
        """Number types of what `num_bytes` counts, such as "float32" or "float32+int32".

        "" where nothing travels.
        """
        kinds = {
            str(t.dtype).removeprefix("torch.")
            for a in self.tensors.values()
            for t in a.values()
            if t.numel()
        }
        return "+".join(sorted(kinds | ({"float64"} if self.scalars else set())))


@dataclass(frozen=True, slots=True)
class Volume:
    """What one message took: bytes of its arrays, and 8 for each number, without framing.

    And the number types, as `Payload.dtype`.

    Attributes:
        num_bytes: of the arrays as they were written, and 8 for each number.
        dtype: number types of the arrays.
    """

    num_bytes: int = 0
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one client's exchange took, counted where messages are written.

    Attributes:
        down: from the server to the client.
        up: from the client to the server.
    """

    down: Volume
    up: Volume


@dataclass(frozen=True, slots=True)
class Request:
    """Server to client: train in this round from this payload.

    Attributes:
        client_id: who is asked.
        round: its number, from 1.
        seed: of the client's draws in this round.
        payload: what the method's `instruct` gave.
    """

    client_id: ClientId
    round: int
    seed: int
    payload: Payload


@dataclass(frozen=True, slots=True)
class Reply:
    """Client to server: what local training made of it.

    >>> from fedmira.messages import Payload, Reply
    >>> reply = Reply("north", 1, num_examples=12, payload=Payload({"adapter": {}}))
    >>> reply.client_id, reply.num_examples
    ('north', 12)

    Attributes:
        client_id: who answers.
        round: its number, as in the request.
        num_examples: training rows of the client.
        payload: what the method's `finish` gave.
        metrics: figures of local training, such as "loss" and "steps".
        traffic: what travelled, where an engine writes messages; None where payloads are handed
            over as they are.
    """

    client_id: ClientId
    round: int
    num_examples: int
    payload: Payload
    metrics: Mapping[str, float] = field(default_factory=dict)
    traffic: Traffic | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """In place of a reply: what went wrong, and where ("train", "reply", "wire", ...).

    Attributes:
        client_id: whose work failed.
        round: its number, as in the request.
        stage: where it went wrong.
        reason: what went wrong, in words.
        traffic: what travelled all the same, where an engine writes messages.
    """

    client_id: ClientId
    round: int
    stage: str
    reason: str
    traffic: Traffic | None = None
