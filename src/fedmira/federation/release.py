"""What may leave a node: messages of known kinds whose every field is a number or a known text.

A field that is not listed here does not leave. The texts among them are the client's name, what its
operator wrote into the policy, digests, versions, names of formats and of parameters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import fields

from fedmira.data import ClientSummary
from fedmira.errors import RunError
from fedmira.federation.codes import told_failure
from fedmira.federation.policy import Tells
from fedmira.messages import ClientId
from fedmira.metrics import TEXT_METRICS
from fedmira.wire import CHOICE, IDENTITY, LOSSES, SCORES, TRAIN, Encoded

__all__ = ["released", "said_of_failure"]

_DIGEST = re.compile(r"([0-9a-f]{64})?")
_VERSION = re.compile(r"[0-9A-Za-z.+_-]{1,40}")
_NAME = re.compile(r"[\w.:|/ -]{1,400}", re.ASCII)
_NUMBERED = ("metric:", "scalar:")


def released(kind: str, message: Encoded, client: ClientId, tells: Tells) -> Encoded:
    """The message as it may leave the node.

    Args:
        kind: of the message that it answers.
        message: what the node would answer.
        client: the name that the operator gave the node.
        tells: what the operator allows to say.

    Raises:
        RunError: it holds something that may not leave; the message names the field and not its
            value.
    """
    header = message.header
    if kind == TRAIN and header.get("kind") == "failure":
        stage, reason = told_failure(str(header.get("stage")), str(header.get("reason")))
        header = {**header, "client": client, "stage": stage, "reason": reason}
        message = Encoded({}, header)
        checks: Mapping[str, Callable[[object], bool]] = {
            **_addressed(client),
            "stage": _is_text,
            "reason": _is_text,
        }
    elif kind == TRAIN:
        checks = _of_a_reply(client)
    else:
        checks = _OF_A_KIND.get(kind, {})
    for name, value in header.items():
        check = _is_number if name.startswith(_NUMBERED) and kind == TRAIN else checks.get(name)
        if kind == IDENTITY and name == "party":
            _check_party(value, client, tells)
        elif not _NAME.fullmatch(name) or check is None or not check(value):
            raise RunError(f"the answer's {name[:80]!r} may not leave this node; nothing was sent")
    for name in message.arrays:
        if kind != TRAIN or not _NAME.fullmatch(name):
            raise RunError(f"the array {name[:80]!r} may not leave this node; nothing was sent")
    return message


def said_of_failure(message: Encoded) -> str:
    """The words of a failed training, for the node's own log; "" where it did not fail.

    Args:
        message: what the node would answer.
    """
    if message.header.get("kind") != "failure":
        return ""
    return f"{message.header.get('stage')}: {message.header.get('reason')}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _matches(pattern: re.Pattern[str]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _is(expected: object) -> Callable[[object], bool]:
    return lambda value: value == expected


def _are_names(value: object) -> bool:
    """Whether it is a JSON list of names of parts, as the codec writes it."""
    try:
        names = json.loads(str(value))
    except (ValueError, RecursionError):
        return False
    return isinstance(names, list) and all(
        isinstance(name, str) and _NAME.fullmatch(name) for name in names
    )


def _addressed(client: ClientId) -> dict[str, Callable[[object], bool]]:
    return {
        "client": _is(client),
        "round": _is_number,
        "kind": lambda value: value in ("reply", "failure"),
    }


def _of_a_reply(client: ClientId) -> dict[str, Callable[[object], bool]]:
    return {
        **_addressed(client),
        "num_examples": _is_number,
        "wire": _matches(_VERSION),
        "parts": _are_names,
        "reference": _matches(_DIGEST),
        "result": _matches(_DIGEST),
    }


def _check_party(value: object, client: ClientId, tells: Tells) -> None:
    """What a client says of itself: its name, what the operator wrote, and counts.

    Raises:
        RunError: there is more.
    """
    party = json.loads(str(value))
    own = {"client_id": client, "task": tells.task, "category": tells.category}
    for field in fields(ClientSummary):
        allowed = (
            party.get(field.name) == own[field.name]
            if field.name in own
            else _is_number(party.get(field.name))
        )
        if not allowed or len(party) != len(fields(ClientSummary)):
            raise RunError(f"the answer's {field.name!r} may not leave this node; nothing was sent")


def _numbers(*names: str) -> Mapping[str, Callable[[object], bool]]:
    return dict.fromkeys(names, _is_number)


_OF_A_KIND: Mapping[str, Mapping[str, Callable[[object], bool]]] = {
    IDENTITY: {
        "base": _matches(_DIGEST),
        "tokenizer": _matches(_DIGEST),
        "fedmira": _matches(_VERSION),
    },
    LOSSES: _numbers("total", "tokens"),
    CHOICE: _numbers("chosen"),
    SCORES: _numbers(*TEXT_METRICS),
}
"""Kind of message -> field -> whether its value may leave."""
