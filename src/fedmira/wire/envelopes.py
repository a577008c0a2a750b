"""Requests, replies and failures as messages: a payload's arrays, and the rest in the header."""

from __future__ import annotations

from dataclasses import replace

from fedmira.errors import WireError
from fedmira.messages import Failure, Reply, Request
from fedmira.shown import cut, plain
from fedmira.wire.codec import (
    Encoded,
    Header,
    Line,
    decode,
    encode,
)
from fedmira.wire.headers import LONGEST_TEXT, number, text, whole_number
from fedmira.wire.replies import address_problem, checked_reply

__all__ = [
    "ACCEPTED_ROUND",
    "RUN",
    "WIRE_STAGE",
    "decode_answer",
    "decode_request",
    "encode_answer",
    "encode_request",
]

RUN, ACCEPTED_ROUND = "run", "accepted_round"
"""Names in the header of a request.

The run's id, and the round whose reply the server last accepted from this client.
"""

WIRE_STAGE = "wire"
"""The stage of failures after which the server must send the next message whole."""

_KIND, _CLIENT, _ROUND, _SEED = "kind", "client", "round", "seed"
_ROWS, _METRIC, _STAGE, _REASON = "num_examples", "metric:", "stage", "reason"
_LONGEST_STAGE = 20
_REQUEST, _REPLY, _FAILURE = "request", "reply", "failure"


def encode_request(request: Request, wire: str, line: Line, run_id: str) -> tuple[Encoded, Line]:
    """A request as a message.

    Args:
        request: what is sent.
        wire: "float32", "float16" or "int8".
        line: the server's, for this client.
        run_id: the same in all parts of a run, also after a resume.

    Returns:
        The message, and the line with which the answer is to be read.

    Raises:
        WireError: a tensor has a type that does not travel.
    """
    encoded, after = encode(request.payload, wire, line)
    header: Header = {
        _KIND: _REQUEST,
        _CLIENT: request.client_id,
        _ROUND: request.round,
        _SEED: request.seed,
    }
    header |= {RUN: run_id, ACCEPTED_ROUND: line.round}
    return Encoded(encoded.arrays, {**encoded.header, **header}), after


def decode_request(encoded: Encoded, line: Line) -> tuple[Request, Line]:
    """The request in a message.

    Args:
        encoded: the message as it came.
        line: the client's, as of the round that the header calls accepted.

    Returns:
        The request with the payload as it arrived, and the line with which the answer is to be
        written.

    Raises:
        WireError: the message is malformed, or changes a reference that this end does not hold.
    """
    header = encoded.header
    if text(header, _KIND) != _REQUEST:
        raise WireError(f"the message is a {header[_KIND]!r}; expected a {_REQUEST!r}")
    payload, after = decode(encoded, line)
    return Request(
        text(header, _CLIENT), whole_number(header, _ROUND), whole_number(header, _SEED), payload
    ), after


def encode_answer(answer: Reply | Failure, wire: str, line: Line) -> tuple[Encoded, Line]:
    """A reply or a failure as a message.

    Args:
        answer: what is sent.
        wire: as in the request.
        line: what `decode_request` gave.

    Returns:
        The message, and for a reply the line to remember under its round; for a failure `line` as
        it is.

    Raises:
        WireError: a tensor has a type that does not travel.
    """
    header: Header = {_CLIENT: answer.client_id, _ROUND: answer.round}
    if isinstance(answer, Failure):
        return Encoded(
            {}, {**header, _KIND: _FAILURE, _STAGE: answer.stage, _REASON: answer.reason}
        ), line
    encoded, after = encode(answer.payload, wire, line)
    header |= {
        _KIND: _REPLY,
        _ROWS: answer.num_examples,
        **{_METRIC + name: float(value) for name, value in answer.metrics.items()},
    }
    return Encoded(encoded.arrays, {**encoded.header, **header}), replace(after, round=answer.round)


def decode_answer(request: Request, encoded: Encoded, line: Line) -> tuple[Reply | Failure, Line]:
    """The answer to a request, checked.

    Whatever is wrong with it becomes a failure with its reason.

    Args:
        request: as it was sent.
        encoded: the message as it came.
        line: what `encode_request` gave.

    Returns:
        The reply, with the line after it; or a failure, with `line` as it is, to be dropped.
    """
    header, client, number_ = encoded.header, request.client_id, request.round
    problem = address_problem(request, header.get(_CLIENT), header.get(_ROUND))
    if problem:
        told = plain(cut(problem, LONGEST_TEXT))
        return Failure(client, number_, "reply", told), line
    try:
        kind = text(header, _KIND)
        if kind == _FAILURE:
            stage, reason = text(header, _STAGE), text(header, _REASON)
            told = plain(cut(reason, LONGEST_TEXT))
            return Failure(client, number_, plain(cut(stage, _LONGEST_STAGE)), told), line
        if kind != _REPLY:
            raise WireError(f"the message is a {kind!r}; expected a {_REPLY!r} or a {_FAILURE!r}")
        payload, after = decode(encoded, line)
        metrics = {
            name.removeprefix(_METRIC): number(header, name)
            for name in header
            if name.startswith(_METRIC)
        }
        reply = checked_reply(
            request, Reply(client, number_, whole_number(header, _ROWS), payload, metrics)
        )
    except WireError as error:
        told = plain(cut(str(error), LONGEST_TEXT))
        return Failure(client, number_, "reply", told), line
    return reply, replace(after, round=number_) if isinstance(reply, Reply) else line
