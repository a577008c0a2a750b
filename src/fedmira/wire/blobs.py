"""A message as one run of bytes.

Its arrays in the safetensors format, its header as JSON in that format's own header.
"""

from __future__ import annotations

import json

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from fedmira.errors import WireError
from fedmira.wire.codec import Encoded

__all__ = ["pack", "unpack"]

_HEADER, _LENGTH_BYTES = "message", 8
_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
}


def pack(message: Encoded) -> bytes:
    """The message as bytes; nothing in them is ever executed."""
    return save(
        {name: np.ascontiguousarray(array) for name, array in message.arrays.items()},
        {_HEADER: json.dumps(dict(message.header))},
    )


def unpack(content: bytes) -> Encoded:
    """The message that `pack` wrote.

    Raises:
        WireError: the bytes are no message.
    """
    try:
        length = int.from_bytes(content[:_LENGTH_BYTES], "little")
        about = json.loads(content[_LENGTH_BYTES : _LENGTH_BYTES + length])
        header = json.loads(about["__metadata__"][_HEADER])
        # Half a character, which JSON can escape, could be written into no file and on no screen.
        json.dumps(header, ensure_ascii=False).encode()
        arrays = {
            name: np.frombuffer(
                form["data"], dtype=np.dtype(_TYPES[form["dtype"]]).newbyteorder("<")
            ).reshape(form["shape"])
            for name, form in deserialize(content)  # type: ignore[no-untyped-call]
        }
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(
            f"{len(content)} bytes came, but they are no message ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(header, dict) or not all(
        isinstance(value, str | int | float) for value in header.values()
    ):
        raise WireError("the message's header is no mapping of names to texts and numbers")
    return Encoded(
        {
            name: array.astype(array.dtype.newbyteorder("="), copy=False)
            for name, array in arrays.items()
        },
        header,
    )
