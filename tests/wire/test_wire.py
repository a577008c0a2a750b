"""Messages: round trips, error feedback, what they weigh, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmira.adapters import (
    digest,
    distance,
    norm,
    subtract,
)
from fedmira.errors import WireError
from fedmira.messages import Payload, Volume
from fedmira.wire import (
    Encoded,
    Line,
    decode,
    encode,
    joined,
    pack,
    separated,
    unpack,
)

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
RANK, INTO, OUT = 4, 9, 6
COMPRESSED = ("float16", "int8")

seeds = st.integers(0, 2**31)


def adapter(seed: int, size: float = 1.0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        A: size * torch.randn(RANK, INTO, generator=draw),
        B: size * torch.randn(OUT, RANK, generator=draw),
    }


def moved(start: dict[str, Tensor], seed: int, size: float) -> dict[str, Tensor]:
    return {
        name: tensor + change
        for (name, tensor), change in zip(start.items(), adapter(seed, size).values(), strict=True)
    }


def with_reference(tensors: dict[str, Tensor], unsent: dict[str, Tensor] | None = None) -> Line:
    return Line(3, {"adapter": tensors}, {"adapter": unsent} if unsent else {})


def over_bytes(encoded: Encoded) -> Encoded:
    """The message as a transport carries it.

    As bytes, read from memory that must not be written to.
    """
    return unpack(pack(encoded))


def hashes(payload: Payload) -> dict[str, str]:
    return {part: digest(tensors) for part, tensors in payload.tensors.items()}


def same(left: Payload, right: Payload) -> bool:
    return (
        list(left.tensors) == list(right.tensors)
        and hashes(left) == hashes(right)
        and left.scalars == right.scalars
    )


NAMES = st.text("abc._é", max_size=4)
SHAPES = st.tuples(st.integers(0, 3), st.integers(0, 3))


@given(st.dictionaries(NAMES, SHAPES, max_size=4), seeds)
@settings(deadline=None, max_examples=40)
def test_a_whole_payload_comes_back_bit_for_bit(
    shapes: dict[str, tuple[int, int]], seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    numbers = {
        "seeds": torch.arange(seed % 5, dtype=torch.int32),
        "places": torch.arange(3),
        "nothing": torch.zeros(0),
    }
    payload = Payload({"adapter": tensors, "numbers": numbers, "empty": {}}, {"step": 0.1 + seed})
    for wire in ("float32", *COMPRESSED):
        encoded, sender = encode(payload, wire, Line())
        found, receiver = decode(over_bytes(encoded), Line())
        assert same(found, payload)
        assert sender.digest == receiver.digest and sender.unsent == receiver.unsent == {}


def test_16_bits_travel_as_float32_and_never_touch_numpy() -> None:
    values = torch.randn(5, 3)
    payload = Payload(
        {"adapter": {"bf": values.to(torch.bfloat16), "half": values.to(torch.float16)}}
    )
    encoded, _ = encode(payload, "float32", Line())
    assert {array.dtype.name for array in encoded.arrays.values()} == {"float32"}
    found, _ = decode(encoded, Line())
    for name, tensor in payload.tensors["adapter"].items():
        assert torch.equal(found.tensors["adapter"][name].to(tensor.dtype), tensor)


def test_a_type_that_would_lose_digits_is_refused() -> None:
    with pytest.raises(
        WireError, match=r"x: a tensor of torch.float64 does not travel; must be one of float32"
    ):
        encode(Payload({"adapter": {"x": torch.zeros(2, dtype=torch.float64)}}), "float32", Line())


@given(seeds, st.floats(1e-6, 1e3))
@settings(deadline=None)
def test_rounding_to_int8_is_off_by_half_a_scale_at_most(seed: int, size: float) -> None:
    start = adapter(seed)
    target = moved(start, seed + 1, size)
    encoded, after = encode(Payload({"adapter": target}), "int8", with_reference(start))
    for name, axis in ((A, 1), (B, 0)):  # a scale for each row of A and each column of B
        change = (target[name].double() - start[name]).abs()
        half = change.amax(dim=axis, keepdim=True) / 127 / 2
        rounding = 1e-6 * (
            target[name].abs() + start[name].abs()
        )  # of the result, which is float32
        off = (after.reference["adapter"][name].double() - target[name]).abs()
        assert bool((off <= half * (1 + 1e-5) + rounding).all())
        counts = encoded.arrays[f"adapter|{name}|change"]
        assert counts.dtype == np.int8 and int(np.abs(counts.astype(int)).max()) == 127


@given(seeds)
@settings(deadline=None)
def test_rounding_to_float16_keeps_eleven_digits_of_the_change(seed: int) -> None:
    start = adapter(seed)
    target = moved(start, seed + 1, 0.01)
    _, after = encode(Payload({"adapter": target}), "float16", with_reference(start))
    for name, tensor in target.items():
        off = (after.reference["adapter"][name].double() - tensor).abs()
        assert bool(
            (off <= 2**-11 * (tensor - start[name]).abs() + 2**-24 + 1e-6 * tensor.abs()).all()
        )


@pytest.mark.parametrize("wire", COMPRESSED)
@given(seed=seeds, sizes=st.lists(st.floats(1e-5, 10), min_size=1, max_size=12))
@settings(deadline=None, max_examples=30)
def test_what_was_sent_and_what_is_carried_add_up_to_all_changes(
    wire: str, seed: int, sizes: list[float]
) -> None:
    """sum D(c) + e = sum (theta - ref), where each change starts from what the other end holds."""
    first = adapter(seed)
    sender, receiver = with_reference(first), with_reference(first)
    changes = {
        name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in first.items()
    }
    for number, size in enumerate(sizes):
        held = dict(sender.reference["adapter"])
        target = moved(held, seed + 1 + number, size)
        changes = {
            name: changes[name] + (target[name].double() - held[name].double()) for name in changes
        }
        encoded, sender = encode(Payload({"adapter": target}), wire, sender)
        payload, receiver = decode(over_bytes(encoded), receiver)
        assert (
            digest(payload.tensors["adapter"])
            == digest(receiver.reference["adapter"])
            == digest(sender.reference["adapter"])
        )
    for name, total in changes.items():
        arrived = receiver.reference["adapter"][name].double() - first[name].double()
        carried = sender.unsent["adapter"][name].double()
        # Each message rounds what it holds to float32 once.
        assert torch.allclose(arrived + carried, total, rtol=0, atol=1e-6 * max(1.0, max(sizes)))


def test_a_change_too_small_for_its_row_arrives_in_the_end() -> None:
    """Entry 0 of each row moves by a 1000th of entry 1, a tenth of a scale's half.

    Without feedback it would never move.
    """
    start = {A: torch.zeros(2, 2)}
    step = torch.tensor([[0.001, 1.0], [0.001, 1.0]])
    line = with_reference(start)
    for _ in range(50):
        held = line.reference["adapter"][A]
        _, line = encode(Payload({"adapter": {A: held + step}}), "int8", line)
    reached = line.reference["adapter"][A]
    assert reached[0, 0].item() == pytest.approx(0.05, abs=1 / 127)
    assert reached[0, 1].item() == pytest.approx(50, abs=1 / 127)


def test_bytes_are_counted_as_they_are_written() -> None:
    """n parameters: 4 n whole; 2 n as float16.

    As int8 n and a float32 scale for each row of A and column of B; 8 for each number.
    """
    start, parameters, scales = adapter(0), RANK * (INTO + OUT), 2 * RANK
    payload = Payload({"adapter": moved(start, 1, 0.1)}, {"step": 1.0})
    expected = {
        "float32": Volume(4 * parameters + 8, "float32+float64"),
        "float16": Volume(2 * parameters + 8, "float16+float64"),
        "int8": Volume(parameters + 4 * scales + 8, "float32+float64+int8"),
    }
    for wire, volume in expected.items():
        assert encode(payload, wire, with_reference(start))[0].volume == volume
        assert encode(payload, wire, Line())[0].volume == expected["float32"], (
            "without a reference all is whole"
        )
    assert payload.num_bytes == expected["float32"].num_bytes, (
        "as payloads that are handed over count"
    )


START = adapter(0)
HUGE = {name: 3e38 * torch.sign(tensor) for name, tensor in START.items()}
CANNOT = {
    "infinite numbers": (START, {**START, B: torch.full_like(START[B], float("inf"))}),
    "another rank": (START, {A: START[A][:2], B: START[B][:, :2]}),
    "a change beyond float32": ({name: -tensor for name, tensor in HUGE.items()}, HUGE),
}


@pytest.mark.parametrize("wire", COMPRESSED)
@pytest.mark.parametrize("case", CANNOT)
def test_what_changes_cannot_express_goes_whole_and_carries_nothing(case: str, wire: str) -> None:
    held, target = CANNOT[case]
    line = with_reference(held, adapter(5, 0.01))
    encoded, after = encode(Payload({"adapter": target}), wire, line)
    found, receiver = decode(encoded, line)
    assert f"adapter|{B}" in encoded.arrays
    assert torch.equal(found.tensors["adapter"][B], target[B]) and receiver.digest == after.digest
    assert B not in after.unsent.get("adapter", {})


def test_a_change_too_large_for_float16_goes_whole() -> None:
    target = {**START, A: START[A] + 1e5}
    encoded, after = encode(Payload({"adapter": target}), "float16", with_reference(START))
    assert set(encoded.arrays) == {f"adapter|{A}", f"adapter|{B}|change"}
    assert torch.equal(after.reference["adapter"][A], target[A])
    assert decode(encoded, with_reference(START))[1].digest == after.digest


def test_what_was_carried_goes_along_with_a_tensor_that_goes_whole() -> None:
    carried, target = adapter(7), {**START, A: START[A] + 1e5}
    encoded, after = encode(Payload({"adapter": target}), "float16", with_reference(START, carried))
    expected = (target[A].double() + carried[A]).float()
    found, receiver = decode(over_bytes(encoded), with_reference(START))
    assert torch.equal(found.tensors["adapter"][A], expected) and not torch.equal(
        expected, target[A]
    )
    assert receiver.digest == after.digest and set(after.unsent["adapter"]) == {B}, (
        "nothing of A is still to be sent"
    )


def test_no_change_is_no_change_and_zero_rows_have_no_scale() -> None:
    start = {A: torch.zeros(3, 4), B: torch.zeros(5, 3)}
    for wire in COMPRESSED:
        encoded, line = encode(Payload({"adapter": start}), wire, with_reference(start))
        assert all(not array.any() for array in encoded.arrays.values())
        assert (
            digest(line.reference["adapter"]) == digest(start) and norm(line.unsent["adapter"]) == 0
        )


def test_a_line_and_a_memory_share_one_payload() -> None:
    line = Line(7, {"adapter": adapter(1), "more": adapter(2)}, {"adapter": adapter(3)})
    memory = Payload({"optimizer.first": adapter(4)}, {"optimizer.steps": 3.0})
    both = joined({"own": memory, "line": line.as_payload()})
    own, found = separated(both, "own"), Line.of(separated(both, "line"))
    assert own is not None and same(own, memory)
    assert (found.round, found.digest) == (7, line.digest) and norm(
        subtract(found.unsent["adapter"], adapter(3))
    ) == 0
    assert separated(joined({"own": None, "line": line.as_payload()}), "own") is None
    assert separated(None, "line") is None and Line.of(None) == Line()


def broken(encoded: Encoded, what: str, value: Any) -> Encoded:
    """The message with one entry replaced, or removed where the value is None.

    The entry is an array or one of the header.
    """
    arrays: dict[str, Any] = dict(encoded.arrays)
    header: dict[str, Any] = dict(encoded.header)
    side: dict[str, Any] = arrays if "|" in what else header
    side.pop(what, None)
    if value is not None:
        side[what] = value
    return Encoded(arrays, header)


@pytest.mark.parametrize(
    ("what", "value", "reason"),
    [
        ("wire", None, "the header's wire is None; must be a text"),
        (
            "wire",
            "int2",
            "the message is in format 'int2'; this fedmira reads float32, float16, int8",
        ),
        ("parts", "adapter", "must be a JSON list of names"),
        ("parts", "[1]", "must be a JSON list of names"),
        ("parts", "[]", r"but its header names only the parts none"),
        (
            "reference",
            "f" * 64,
            r"the message changes reference f{16}, but this end holds [0-9a-f]{16} \(of round 3\)",
        ),
        ("result", "f" * 64, "what was read is not what was sent"),
        ("scalar:step", "much", "the header's scalar:step is 'much'; must be a number"),
        (
            f"adapter|{A}|change",
            None,
            f"{A}: the message has no change; needs one of shape \\(4, 9\\)",
        ),
        (
            f"adapter|{A}|change",
            np.zeros((4, 8), np.int8),
            r"its change is int8 \(4, 8\); must be int8 \(4, 9\)",
        ),
        (
            f"adapter|{A}|change",
            np.zeros((4, 9), np.float64),
            r"its change is float64 \(4, 9\); must be int8 \(4, 9\)",
        ),
        (f"adapter|{A}|change", np.zeros((4, 9), np.int8), "what was read is not what was sent"),
        (
            f"adapter|{A}|scale",
            np.zeros(9, np.float32),
            r"its scale is float32 \(9,\); must be float32 \(4,\)",
        ),
        (
            f"adapter|{A}|scale",
            np.zeros(4, ">f4"),
            r"its scale is float32 \(4,\); must be float32 \(4,\)",
        ),
        (
            "adapter|other",
            np.zeros(2, np.complex64),
            "other: the message holds complex64; must be one of float32, int32, int64",
        ),
        ("adapter|other", np.array([{}], dtype=object), "other: the message holds object"),
        (
            "adapter|other|change",
            np.zeros(2, np.int8),
            r"adapter\|other: the message holds a change, but this end has no reference for it",
        ),
        (
            "a|b|c|d",
            np.zeros(2, np.int8),
            r"arrays are named part\|parameter or part\|parameter\|what",
        ),
        (
            "strange|b",
            np.zeros(2, np.float32),
            r"the message holds strange\|b, but its header names only the parts adapter",
        ),
    ],
)
def test_a_malformed_message_is_refused_and_says_why(what: str, value: Any, reason: str) -> None:
    line = with_reference(adapter(0))
    encoded, _ = encode(
        Payload({"adapter": moved(adapter(0), 1, 0.1)}, {"step": 1.0}), "int8", line
    )
    decode(encoded, line)
    with pytest.raises(WireError, match=reason):
        decode(broken(encoded, what, value), line)


def test_an_end_without_the_reference_says_so() -> None:
    encoded, _ = encode(
        Payload({"adapter": moved(adapter(0), 1, 0.1)}), "int8", with_reference(adapter(0))
    )
    with pytest.raises(
        WireError, match=r"but this end holds none \(of round 0\); the next message is sent whole"
    ):
        decode(encoded, Line())


def test_changes_of_changes_stay_near_the_target() -> None:
    """A target that moves by a tenth of itself a round is followed closely.

    Within a hundredth of that step.
    """
    line, target = with_reference(adapter(0)), adapter(0)
    for number in range(20):
        target = moved(target, 100 + number, 0.1)
        _, line = encode(Payload({"adapter": target}), "int8", Line(line.round, line.reference))
        assert distance(line.reference["adapter"], target) < 0.01 * norm(adapter(100 + number, 0.1))
