"""A message's bytes in Flower's records, and back.

Imported for every message on a node, so it imports nothing else.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, RecordDict

__all__ = ["bytes_of", "record_of"]

_RECORD, _ARRAY, _TYPE = "fedmira", "message", "fedmira.safetensors"


def record_of(content: bytes) -> RecordDict:
    """The bytes as one array, which Flower cuts into pieces where they are many."""
    return RecordDict(
        {
            _RECORD: ArrayRecord(
                {_ARRAY: Array(dtype="uint8", shape=(len(content),), stype=_TYPE, data=content)}
            )
        }
    )


def bytes_of(record: RecordDict) -> bytes:
    """The bytes that `record_of` was given.

    Raises:
        KeyError: the record is none of fedmira's.
    """
    array = record.array_records[_RECORD][_ARRAY]
    return bytes(array.data)
