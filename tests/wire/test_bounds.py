"""Whatever a client says of itself, it fails alone: counts, figures, names, texts are bounded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fedmira.messages import Failure, Payload, Reply, Request
from fedmira.wire import (
    LONGEST_TEXT,
    Encoded,
    Line,
    checked_reply,
    decode_answer,
    encode_answer,
    encode_request,
)

ADAPTER = {"a.weight": torch.ones(2, 3)}
REQUEST = Request("apple", 1, 7, Payload({"adapter": ADAPTER}))
FIGURES = {
    "loss": 0.5,
    "first_loss": 0.6,
    "last_loss": 0.4,
    "steps": 2.0,
    "response_tokens": 9.0,
    "tokens": 30.0,
}
REPLY = Reply("apple", 1, 12, Payload({"adapter": ADAPTER}), FIGURES)


def answered(change: Mapping[str, Any]) -> Reply | Failure:
    """What the server makes of a reply whose header says something else."""
    line = encode_request(REQUEST, "float32", Line(), "run")[1]
    message = encode_answer(REPLY, "float32", line)[0]
    return decode_answer(REQUEST, Encoded(message.arrays, {**message.header, **change}), line)[0]


def test_an_honest_reply_passes() -> None:
    assert isinstance(answered({}), Reply)


@pytest.mark.parametrize(
    "rows",
    [
        10**18,
        10**400,
        -(10**400),
        -1,
        0,
        True,
        False,
        math.nan,
        math.inf,
        1e9,
        "12",
        "",
        None,
        [12],
    ],
)
def test_an_impossible_count_of_rows_is_a_failure_of_the_client(rows: Any) -> None:
    answer = answered({"num_examples": rows})
    assert isinstance(answer, Failure) and answer.stage == "reply"
    assert len(answer.reason) <= LONGEST_TEXT
    found = checked_reply(REQUEST, replace(REPLY, num_examples=rows))
    assert isinstance(found, Failure) and "training rows" in found.reason


@pytest.mark.parametrize("name", ["loss", "first_loss", "last_loss", "steps", "tokens"])
@pytest.mark.parametrize("value", [1e300, -1e300, 10**400, math.nan, math.inf, True, "0.5"])
def test_an_impossible_figure_is_a_failure_of_the_client(name: str, value: Any) -> None:
    answer = answered({f"metric:{name}": value})
    assert isinstance(answer, Failure) and name in answer.reason


@pytest.mark.parametrize(("name", "value"), [("pull_kept", 1.5), ("clip_share", -0.1)])
def test_a_share_is_from_0_to_1(name: str, value: float) -> None:
    answer = answered({f"metric:{name}": value})
    assert isinstance(answer, Failure) and f"{name} is {value:g}" in answer.reason


def test_too_many_figures_and_odd_names_are_a_failure_of_the_client() -> None:
    many = answered({f"metric:m{i}": 1.0 for i in range(100)})
    odd = answered({"metric:\x1b[31m": 1.0})
    long = answered({f"metric:{'m' * 300}": 1.0})
    assert isinstance(many, Failure) and "metrics" in many.reason
    assert isinstance(odd, Failure) and "\\x1b[31m" in odd.reason and "\x1b" not in odd.reason
    assert isinstance(long, Failure)


@given(stage=st.text(max_size=400), reason=st.text(max_size=3000))
@example(stage="\x1b]0;x\x07", reason="x" * 10**6)
@example(stage="train", reason="line\nbreak\u202e")
def test_the_words_of_a_failure_are_short_and_can_be_seen(stage: str, reason: str) -> None:
    answer = answered({"kind": "failure", "stage": stage, "reason": reason})
    assert isinstance(answer, Failure)
    assert len(answer.reason) <= 10 * LONGEST_TEXT and len(answer.stage) <= 200
    for text in (answer.stage, answer.reason):
        assert not any(ord(character) < 32 or character in "\u202e\x7f" for character in text)


KEYS = st.sampled_from(
    ["kind", "client", "round", "num_examples", "stage", "reason", "wire", "parts", "reference"]
    + ["result", "metric:loss", "metric:x", "scalar:x", "metric:steps"]
)
VALUES = st.one_of(
    st.text(max_size=20), st.integers(), st.floats(), st.sampled_from([10**400, -(10**400)])
)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_header_is_a_reply_or_a_failure_and_never_an_error(change: dict[str, Any]) -> None:
    answer = answered(change)
    assert isinstance(answer, Reply | Failure) and answer.client_id == "apple"
    if isinstance(answer, Reply):
        assert 1 <= answer.num_examples <= 10**9 and abs(answer.metrics["loss"]) <= 1e6
