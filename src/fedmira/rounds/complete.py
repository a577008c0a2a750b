"""Replies that lack what their method needs of them, or have it in another form than was sent."""

from __future__ import annotations

from collections.abc import Sequence

from fedmira.messages import Failure, Reply, Request

__all__ = ["complete"]


def complete(
    requests: Sequence[Request], answers: Sequence[Reply | Failure], returned: Sequence[str]
) -> list[Reply | Failure]:
    """The answers, with a failure of stage "reply" for a reply that the method cannot use.

    Args:
        requests: of the round.
        answers: what came back, in any order; they keep it.
        returned: parts and numbers that every reply must have beside its adapter; a part that the
            request has too must have its names, shapes and number types.
    """
    sent = {request.client_id: request for request in requests}
    return [
        Failure(answer.client_id, answer.round, "reply", problem, answer.traffic)
        if isinstance(answer, Reply)
        and (problem := _problem(sent.get(answer.client_id), answer, returned))
        else answer
        for answer in answers
    ]


def _problem(request: Request | None, reply: Reply, returned: Sequence[str]) -> str:
    """What is wrong with a reply; "" where nothing is."""
    for name in returned:
        found = reply.payload.tensors.get(name)
        if found is None and name not in reply.payload.scalars:
            return f"the reply has no {name!r}, which the method needs beside the adapter"
        expected = request.payload.tensors.get(name) if request is not None else None
        if expected is None or found is None:
            continue
        if found.keys() != expected.keys():
            return f"the reply's {name!r} has other names than the one that was sent"
        for key, tensor in expected.items():
            if found[key].shape != tensor.shape or found[key].dtype != tensor.dtype:
                forms = (
                    f"{str(each.dtype).removeprefix('torch.')} {tuple(each.shape)}"
                    for each in (found[key], tensor)
                )
                return f"the reply's {name!r} {key} is {'; expected '.join(forms)}"
    return ""
