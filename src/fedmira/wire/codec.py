"""Payloads as named arrays: whole, or as compressed changes of a reference.

Both ends hold the reference, and errors are fed back.

Error feedback (Seide et al. 2014, "1-Bit Stochastic Gradient Descent and its Application to
Data-Parallel Distributed Training of Speech DNNs"; Karimireddy et al. 2019, "Error Feedback Fixes
SignSGD and other Gradient Compression Schemes", arXiv 1901.09847). With theta what an end wants to
send, ref what both ends hold, e what it could not send before and C, D a compression and its
inverse,

    u = (theta - ref) + e      c = C(u)      sent: c      ref  <-  ref + D(c)      e  <-  u - D(c)

so that what was sent and what is carried add up to all changes: sum D(c) + e = sum (theta - ref).
The receiver does the same to its ref and both hold the same bits. After each message theta is
replaced by ref (a client trains from what it received, the server mixes what it received), so theta
itself holds nothing of e, and nothing is counted twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedmira.adapters import Adapter, content_hash
from fedmira.errors import WireError
from fedmira.messages import Payload, Volume, flat_name, flattened
from fedmira.wire.formats import COMPRESSIONS, Array, as_tensor
from fedmira.wire.headers import number, text

__all__ = ["Encoded", "Header", "Line", "decode", "encode", "joined", "separated"]

Header = dict[str, str | int | float]
"""Names and plain values, as every transport can carry them."""

_BETWEEN = "|"
_FORMAT, _PARTS, _REFERENCE, _RESULT, _SCALAR = "wire", "parts", "reference", "result", "scalar:"
_FULL = "float32"
_WHOLE_TYPES = {"float32": torch.float32, "int32": torch.int32, "int64": torch.int64}
_WIDENED = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A message: named arrays and a header.

    Without pickle, and without bfloat16, which numpy does not know.

    Attributes:
        arrays: "part|parameter" whole, or "part|parameter|change" and, for int8,
            "part|parameter|scale".
        header: what the receiver must know to read them; a transport may add names of its own.
    """

    arrays: Mapping[str, Array]
    header: Header

    @property
    def volume(self) -> Volume:
        """Bytes of all arrays, and 8 for each number of the payload.

        Names, digests and framing do not count.
        """
        numbers = sum(name.startswith(_SCALAR) for name in self.header)
        kinds = {array.dtype.name for array in self.arrays.values() if array.size} | (
            {"float64"} if numbers else set()
        )
        return Volume(
            sum(array.nbytes for array in self.arrays.values()) + 8 * numbers,
            "+".join(sorted(kinds)),
        )


@dataclass(frozen=True, slots=True)
class Line:
    """What one end, server or client, remembers of the line between the two.

    It is as of the last reply that was accepted.

    Attributes:
        round: of that reply; 0 before the first. A client that has gone further drops what came
            after it.
        reference: part -> adapter, what both ends hold, bit for bit; empty where messages are
            float32.
        unsent: part -> what compression has kept from the other end so far; each end has its own.
    """

    round: int = 0
    reference: Mapping[str, Adapter] = field(default_factory=dict)
    unsent: Mapping[str, Adapter] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the reference; "" where there is none."""
        return _digest(self.reference) if self.reference else ""

    def as_payload(self) -> Payload:
        """The line as tensors and numbers, for a checkpoint or a memory on disk."""
        tensors = {f"reference.{part}": adapter for part, adapter in self.reference.items()}
        tensors |= {f"unsent.{part}": adapter for part, adapter in self.unsent.items()}
        return Payload(tensors, {"round": float(self.round)})

    @classmethod
    def of(cls, payload: Payload | None) -> Line:
        """The line that `as_payload` wrote; a new one where there is none."""
        if payload is None:
            return cls()
        sides: dict[str, dict[str, Adapter]] = {"reference": {}, "unsent": {}}
        for name, adapter in payload.tensors.items():
            side, _, part = name.partition(".")
            sides[side][part] = adapter
        return cls(int(payload.scalars["round"]), **sides)


def encode(payload: Payload, wire: str, line: Line) -> tuple[Encoded, Line]:
    """Write a payload for the other end.

    A tensor goes as a compressed change where the format compresses and the reference holds one of
    its name and shape, and else whole in its own type (float32, int32 or int64; bfloat16 and
    float16 are widened to float32, exactly). What a change cannot express in finite numbers, such
    as one too large for float16, goes whole together with what was carried of it, and nothing
    remains.

    Args:
        payload: what is sent.
        wire: "float32", "float16" or "int8".
        line: of this end.

    Returns:
        The message, and the line as it is once the other end has read it.

    Raises:
        WireError: a tensor has a type that does not travel.
    """
    arrays: dict[str, Array] = {}
    received: dict[str, dict[str, Tensor]] = {}
    unsent: dict[str, dict[str, Tensor]] = {}
    changed = False
    for part, adapter in payload.tensors.items():
        received[part], unsent[part] = {}, {}
        for name, tensor in adapter.items():
            key, own = flat_name(part, name), _travelling(name, tensor)
            written = _as_change(name, own, line, part, wire)
            if written is None:
                received[part][name] = whole = _with_carried(own, _carried(name, own, line, part))
                arrays[key] = whole.numpy()
                continue
            changed = True
            arrays |= {flat_name(key, what): array for what, array in written[0].items()}
            received[part][name], unsent[part][name] = written[1:]
    header: Header = {
        _FORMAT: wire,
        _PARTS: json.dumps(list(payload.tensors)),
        _REFERENCE: line.digest if changed else "",
        _RESULT: _digest(received),
        **{_SCALAR + name: float(value) for name, value in payload.scalars.items()},
    }
    after = _advanced(line, wire, received, changed)
    return Encoded(arrays, header), replace(
        after, unsent={**line.unsent, **unsent} if changed else {}
    )


def decode(encoded: Encoded, line: Line) -> tuple[Payload, Line]:
    """Read a payload from the other end.

    Args:
        encoded: the message as it came.
        line: of this end.

    Returns:
        The payload, equal to the sender's reference bit for bit, and the line after it.

    Raises:
        WireError: the header or an array is not what it must be, the sender's reference is another
            one than ours, or the result differs from the sender's.
    """
    header = encoded.header
    wire, reference = text(header, _FORMAT), text(header, _REFERENCE)
    if wire != _FULL and wire not in COMPRESSIONS:
        raise WireError(
            f"the message is in format {wire!r}; this fedmira reads "
            f"{', '.join([_FULL, *COMPRESSIONS])}"
        )
    if reference and reference != line.digest:
        raise WireError(
            f"the message changes reference {reference[:16]}, but this end holds "
            f"{line.digest[:16] or 'none'} (of round {line.round}); the "
            "next message is sent whole"
        )
    received: dict[str, dict[str, Tensor]] = {part: {} for part in _names(header)}
    for (part, name), arrays in _by_tensor(encoded.arrays).items():
        if part not in received:
            raise WireError(
                f"the message holds {flat_name(part, name)}, but its header names only the "
                f"parts {', '.join(received) or 'none'}"
            )
        whole = arrays.get("")
        received[part][name] = (
            _from_whole(name, whole)
            if whole is not None
            else _from_change(name, arrays, line, part, wire)
        )
    if _digest(received) != text(header, _RESULT):
        raise WireError(
            "what was read is not what was sent: the message was changed on its way, or "
            "both ends compute differently"
        )
    scalars = {
        name.removeprefix(_SCALAR): number(header, name)
        for name in header
        if name.startswith(_SCALAR)
    }
    after = _advanced(line, wire, received, bool(reference))
    return Payload(received, scalars), after if reference else replace(after, unsent={})


def joined(payloads: Mapping[str, Payload | None]) -> Payload:
    """Several payloads as one whose names begin with theirs; `separated` takes them apart."""
    present = {name: payload for name, payload in payloads.items() if payload is not None}
    tensors = {
        f"{name}.{part}": adapter
        for name, payload in present.items()
        for part, adapter in payload.tensors.items()
    }
    return Payload(
        tensors,
        {
            f"{name}.{key}": value
            for name, payload in present.items()
            for key, value in payload.scalars.items()
        },
    )


def separated(payload: Payload | None, name: str) -> Payload | None:
    """One of the payloads that were `joined`; None where nothing bears its name.

    Args:
        payload: what `joined` gave, or None.
        name: of the payload that is wanted.
    """
    if payload is None:
        return None
    start = f"{name}."
    tensors = {
        part.removeprefix(start): adapter
        for part, adapter in payload.tensors.items()
        if part.startswith(start)
    }
    scalars = {
        key.removeprefix(start): value
        for key, value in payload.scalars.items()
        if key.startswith(start)
    }
    return Payload(tensors, scalars) if tensors or scalars else None


def _advanced(line: Line, wire: str, received: Mapping[str, Adapter], changed: bool) -> Line:
    """The line with its reference after a message.

    One that was sent whole begins anew, and float32 needs no reference.
    """
    if wire == _FULL:
        return replace(line, reference={})
    return replace(line, reference={**line.reference, **received} if changed else received)


def _travelling(name: str, tensor: Tensor) -> Tensor:
    """The tensor as it may travel.

    On the CPU, in one piece, of a type that numpy and every machine know.

    Raises:
        WireError: it has another type.
    """
    own = (
        tensor.detach()
        .to("cpu", torch.float32 if tensor.dtype in _WIDENED else tensor.dtype)
        .contiguous()
    )
    if own.dtype not in _WHOLE_TYPES.values():
        raise WireError(
            f"{name}: a tensor of {own.dtype} does not travel; must be one of "
            f"{', '.join(_WHOLE_TYPES)}, bfloat16, float16"
        )
    return own


def _as_change(
    name: str, own: Tensor, line: Line, part: str, wire: str
) -> tuple[dict[str, Array], Tensor, Tensor] | None:
    """Arrays of the change, what the receiver makes of them, and what remains unsent.

    None where the tensor must go whole.

    In float64, so that each of the two results is rounded once.
    """
    known = line.reference.get(part, {}).get(name)
    if (
        wire not in COMPRESSIONS
        or known is None
        or known.shape != own.shape
        or not known.dtype == own.dtype == torch.float32
    ):
        return None
    carried = _carried(name, own, line, part)
    target = own.to(torch.float64) if carried is None else own.to(torch.float64) + carried
    change = (target - known).to(torch.float32)
    if not bool(torch.isfinite(change).all()):
        return None
    arrays = COMPRESSIONS[wire].pack(name, change)
    received = _moved(known, COMPRESSIONS[wire].unpack(name, arrays, own.shape))
    if not bool(torch.isfinite(received).all()):
        return None
    return arrays, received, (target - received).to(torch.float32)


def _carried(name: str, own: Tensor, line: Line, part: str) -> Tensor | None:
    """What could not be sent of a tensor before; None where there is nothing of this shape."""
    carried = line.unsent.get(part, {}).get(name)
    return (
        carried
        if carried is not None and own.dtype == torch.float32 and carried.shape == own.shape
        else None
    )


def _with_carried(own: Tensor, carried: Tensor | None) -> Tensor:
    """theta + e, which goes whole; rounded once."""
    return own if carried is None else (own.to(torch.float64) + carried).to(torch.float32)


def _moved(known: Tensor, change: Tensor) -> Tensor:
    """ref + D(c), the same on both ends."""
    return (known.to(torch.float64) + change).to(torch.float32)


def _from_change(
    name: str, arrays: Mapping[str, Array], line: Line, part: str, wire: str
) -> Tensor:
    """What a change makes of the reference.

    Raises:
        WireError: there is nothing that it could change, or its arrays do not fit.
    """
    known = line.reference.get(part, {}).get(name)
    if known is None or wire not in COMPRESSIONS:
        raise WireError(
            f"{flat_name(part, name)}: the message holds a change, but this end has no "
            "reference for it"
        )
    return _moved(known, COMPRESSIONS[wire].unpack(name, arrays, known.shape))


def _from_whole(name: str, array: Array) -> Tensor:
    """An array that is a tensor.

    Raises:
        WireError: it has a type that does not travel.
    """
    if array.dtype.name not in _WHOLE_TYPES or not array.dtype.isnative:
        raise WireError(
            f"{name}: the message holds {array.dtype.name}; must be one of "
            f"{', '.join(_WHOLE_TYPES)}"
        )
    return as_tensor(array)


def _by_tensor(arrays: Mapping[str, Array]) -> dict[tuple[str, str], dict[str, Array]]:
    """(part, parameter) -> its arrays; the name of a whole one is "".

    Raises:
        WireError: an array's name has another form.
    """
    found: dict[tuple[str, str], dict[str, Array]] = {}
    for key, array in arrays.items():
        fields = key.split(_BETWEEN)
        if len(fields) not in (2, 3):
            raise WireError(
                f"the message holds {key!r}; arrays are named part|parameter or part|parameter|what"
            )
        found.setdefault((fields[0], fields[1]), {})[fields[2] if len(fields) == 3 else ""] = array
    return found


def _names(header: Header) -> list[str]:
    """The payload's parts.

    Raises:
        WireError: the header does not list them.
    """
    try:
        parts = json.loads(text(header, _PARTS))
    except (ValueError, RecursionError) as error:
        raise WireError(
            f"the header's {_PARTS} is {str(header[_PARTS])[:200]!r}; must be a JSON list of names"
        ) from error
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise WireError(
            f"the header's {_PARTS} is {header[_PARTS]!r}; must be a JSON list of names"
        )
    return parts


def _digest(parts: Mapping[str, Adapter]) -> str:
    """SHA-256 over the tensors of all parts and their names."""
    return content_hash(flattened(parts))
