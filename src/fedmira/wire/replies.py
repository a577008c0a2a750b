"""What a reply must be before the server uses it."""

from __future__ import annotations

import math

from fedmira.adapters import Adapter, all_finite
from fedmira.messages import Failure, Reply, Request

__all__ = ["FIGURES", "WITHHELD", "address_problem", "checked_reply"]

FIGURES = ("loss", "first_loss", "last_loss", "steps", "response_tokens", "tokens")
"""What every reply reports of its training, as metrics."""

WITHHELD = "withheld"
"""The metric by which a private client says that it tells no figures of its rows but its steps."""

_ADAPTER = "adapter"
_NAMED = 3


def checked_reply(request: Request, reply: Reply) -> Reply | Failure:
    """The reply itself, or in its place a failure of stage "reply".

    The failure names what is wrong, its value and what was expected.

    It must be of the request's client and round, tell of at least one row, have all of `FIGURES`
    (of a private client its steps alone),
    and hold finite tensors and numbers only; its adapter must have the names, shapes and number
    types of the one that was sent.

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
    return (
        ""
        if reply.num_examples > 0
        else f"the reply counts {reply.num_examples} training rows; must be at least 1"
    )


def _figures_problem(reply: Reply) -> str:
    withheld = WITHHELD in reply.metrics
    for name in ("steps",) if withheld else FIGURES:
        value = reply.metrics.get(name)
        if value is None or not math.isfinite(value):
            return f"the reply's {name} is {value}; must be a finite number"
    return (
        ""
        if withheld or reply.metrics["response_tokens"] > 0
        else "the reply counts no response tokens; must be at least 1"
    )


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
