"""Bytes that somebody changed are a message, a failure or a WireError, and nothing else.

The long form of this is `make torture`.
"""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmira.errors import WireError
from fedmira.messages import Failure, Payload, Reply, Request
from fedmira.wire import (
    Encoded,
    Line,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
    pack,
    unpack,
)
from fedmira.wire.replies import FIGURES


def adapter(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "l.lora_A.weight": torch.randn(2, 3, generator=draw),
        "l.lora_B.weight": torch.randn(4, 2, generator=draw),
    }


LINE = Line(3, {"adapter": adapter(5)}, {"adapter": adapter(6)})
REQUEST = Request("c", 4, 1, Payload({"adapter": adapter(1), "more": {}}, {"x": 1.5}))
REPLY = Reply("c", 4, 7, Payload({"adapter": adapter(2)}, {"y": 2.0}), dict.fromkeys(FIGURES, 1.0))
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(10**300, 10**400),
    st.floats(),
    st.text(max_size=8),
    st.just("\ud800"),
    st.lists(st.integers(), max_size=2),
)


def read(content: bytes, of_request: bool, line: Line) -> None:
    """Read it, and write whatever words come of it, as a run does."""
    try:
        message = unpack(content)
        if of_request:
            decode_request(message, line)
            return
        answer, _ = decode_answer(REQUEST, message, line)
    except WireError as error:
        str(error).encode()
    else:
        assert isinstance(answer, Reply | Failure)
        if isinstance(answer, Failure):
            answer.reason.encode()


@pytest.mark.parametrize("wire", ["float32", "float16", "int8"])
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_changed_messages_end_in_an_answer_or_a_wire_error(wire: str, data: st.DataObject) -> None:
    of_request = data.draw(st.booleans())
    sent, after = encode_request(REQUEST, wire, LINE, "run")
    message = sent if of_request else encode_answer(REPLY, wire, after)[0]
    line = LINE if of_request else after
    content = bytearray(pack(message))
    if data.draw(st.booleans()):
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
            content[place] ^= data.draw(st.integers(1, 255))
        read(bytes(content[: data.draw(st.integers(0, len(content)))]), of_request, line)
        read(bytes(content), of_request, line)
        return
    header = dict(message.header)
    header[data.draw(st.sampled_from([*header, "new", "metric:new", "scalar:new"]))] = data.draw(
        ODD
    )
    length = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + length])
    about["__metadata__"]["message"] = json.dumps(header)
    written = json.dumps(about).encode()
    read(len(written).to_bytes(8, "little") + written + content[8 + length :], of_request, line)


def test_half_a_character_in_a_header_is_no_message() -> None:
    with pytest.raises(WireError, match="they are no message"):
        unpack(pack(Encoded({}, {"client": "\ud800"})))
