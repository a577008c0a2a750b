"""A message as bytes, and bytes that are none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedmira.errors import WireError
from fedmira.wire import Encoded, pack, unpack


def test_a_message_comes_back_with_its_types_and_values() -> None:
    arrays = {
        "adapter|a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "adapter|a|change": np.array([[-127, 3]], dtype=np.int8),
        "half": np.array([0.5], dtype=np.float16),
        "seeds": np.array([2**40], dtype=np.int64),
        "nothing": np.zeros((0, 4), dtype=np.float32),
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }
    header = {"text": "ä|\n", "round": 3, "loss": 0.1, "not finite": math.nan}
    found = unpack(pack(Encoded(arrays, header)))
    assert {name: (array.dtype, array.shape) for name, array in found.arrays.items()} == {
        n: (a.dtype, a.shape) for n, a in arrays.items()
    }
    assert all(np.array_equal(found.arrays[name], array) for name, array in arrays.items())
    assert {**found.header, "not finite": 0} == {**header, "not finite": 0} and math.isnan(
        float(found.header["not finite"])
    )
    assert type(found.header["round"]) is int


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        b"\xff" * 100,
        pack(Encoded({}, {}))[:-1],
        b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
    ],
)
def test_other_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(WireError, match="they are no message"):
        unpack(content)
