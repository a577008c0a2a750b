"""What a reply must be before the server uses it."""

from __future__ import annotations

import math

from fedmira.adapters import Adapter, all_finite
from fedmira.messages import Failure, Reply, Request
from fedmira.shown import cut, plain

__all__ = ["FIGURES", "WITHHELD", "address_problem", "checked_reply"]

FIGURES = ("loss", "first_loss", "last_loss", "steps", "response_tokens", "tokens")
"""What every reply reports of its training, as metrics."""

WITHHELD = "withheld"
"""The metric by which a private client says that it tells no figures of its rows but its steps."""

_ADAPTER = "adapter"
_NAMED = 3
_MOST_ROWS = 10**9
_MOST_LOSS = 1e6
"""Nats per token; a model that gives every token of the largest vocabularies the same has 13."""
_MOST_COUNT = 1e13
_LOSSES = ("loss", "first_loss", "last_loss")
_SHARES = ("clip_share", "pull_kept", "memory_lost")
_MOST_METRICS, _MOST_SCALARS, _LONGEST_NAME = 64, 200_000, 200


def checked_reply(request: Request, reply: Reply) -> Reply | Failure:
    """The reply itself, or in its place a failure of stage "reply".

    The failure names what is wrong, its value and what was expected.

    It must be of the request's client and round, tell of at least one row, have all of `FIGURES`
    (of a private client its steps alone) within what training can give, and hold finite tensors and
    numbers only; its adapter must have the names, shapes and number types of the one that was sent.

    Args:
        request: as it was sent.
        reply: what came back.
    """
    problem = (
        address_problem(request, reply.client_id, reply.round)
        or _count_problem(reply)
        or _figures_problem(reply)
        or _adapter_problem(
            request.payload.tensors.get(_ADAPTER), reply.payload.tensors.get(_ADAPTER)
        )
        or _finite_problem(reply)
    )
    return (
        Failure(request.client_id, request.round, "reply", problem, reply.traffic)
        if problem
        else reply
    )


def address_problem(request: Request, client: object, round_number: object) -> str:
    """Why a reply is not one to this request; "" where it is.

    Args:
        request: as it was sent.
        client: whom the reply names.
        round_number: the round that the reply names.
    """
    if client != request.client_id:
        return f"the reply is of client {client!r}; expected {request.client_id!r}"
    if round_number != request.round:
        return f"the reply is of round {round_number!r}; expected round {request.round}"
    return ""


def _count_problem(reply: Reply) -> str:
    rows = reply.num_examples
    if type(rows) is int and 1 <= rows <= _MOST_ROWS:
        return ""
    wanted = (
        f"a whole number from 1 to {_MOST_ROWS}"
        if type(rows) is not int or rows > 0
        else "at least 1"
    )
    return f"the reply counts {_short(rows)} training rows; must be {wanted}"


def _figures_problem(reply: Reply) -> str:
    if len(reply.metrics) > _MOST_METRICS or len(reply.payload.scalars) > _MOST_SCALARS:
        return (
            f"the reply has {len(reply.metrics)} metrics and {len(reply.payload.scalars)} numbers; "
            f"must be at most {_MOST_METRICS} and {_MOST_SCALARS}"
        )
    names = (*reply.metrics, *reply.payload.scalars, *reply.payload.tensors)
    if unfit := next((name for name in names if _is_unfit(name)), None):
        return f"the reply names a figure {plain(cut(unfit, 80))!r}; names are short and plain"
    withheld = WITHHELD in reply.metrics
    for name in ("steps",) if withheld else FIGURES:
        value = reply.metrics.get(name)
        if value is None or not math.isfinite(value):
            return f"the reply's {name} is {value}; must be a finite number"
    if not withheld and reply.metrics["response_tokens"] < 1:
        return "the reply counts no response tokens; must be at least 1"
    return _size_problem(reply)


def _size_problem(reply: Reply) -> str:
    """Which figure is beyond what training can give."""
    for name, value in reply.metrics.items():
        most = _MOST_LOSS if name in _LOSSES else 1.0 if name in _SHARES else _MOST_COUNT
        least = -_MOST_LOSS if name in _LOSSES else 0.0 if name in (*FIGURES, *_SHARES) else -most
        if not least <= value <= most and math.isfinite(value):
            return f"the reply's {name} is {value:g}; must be from {least:g} to {most:g}"
    return ""


def _short(value: object) -> str:
    """A value as text; Python refuses to write whole numbers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return "10^18 or more" if value > 0 else "-10^18 or less"
    return plain(cut(str(value), 40))


def _is_unfit(name: str) -> bool:
    return len(name) > _LONGEST_NAME or plain(name) != name


def _adapter_problem(sent: Adapter | None, found: Adapter | None) -> str:
    """How the reply's adapter differs in form from the one that was sent."""
    if sent is None:
        return ""
    if found is None:
        return f"the reply holds no {_ADAPTER}; expected one of {len(sent)} tensors"
    missing, strange = sorted(set(sent) - set(found)), sorted(set(found) - set(sent))
    if missing or strange:
        listed = [f"lacks {', '.join(missing[:_NAMED])}"] * bool(missing) + [
            f"also holds {', '.join(strange[:_NAMED])}"
        ] * bool(strange)
        named = " and ".join(listed)
        return f"the reply's {_ADAPTER} {named}; expected the {len(sent)} names of the request"
    for name, tensor in sent.items():
        form, expected = (
            f"{str(each.dtype).removeprefix('torch.')} {tuple(each.shape)}"
            for each in (found[name], tensor)
        )
        if form != expected:
            return f"the reply's {_ADAPTER} {name} is {form}; expected {expected}"
    return ""


def _finite_problem(reply: Reply) -> str:
    bad = [part for part, adapter in reply.payload.tensors.items() if not all_finite(adapter)]
    bad += [
        name
        for numbers in (reply.payload.scalars, reply.metrics)
        for name, value in numbers.items()
        if not math.isfinite(value)
    ]
    return (
        f"the reply holds non-finite numbers (in {', '.join(bad[:_NAMED])}); the client "
        "keeps its old adapter"
        if bad
        else ""
    )
