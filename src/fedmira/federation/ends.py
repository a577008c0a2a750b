"""Both ends of the lines between a server and clients that are elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedmira.errors import FedmiraError, WireError
from fedmira.federation.node_memory import NodeMemory
from fedmira.messages import (
    ClientId,
    Failure,
    Payload,
    Reply,
    Request,
    Traffic,
    Volume,
)
from fedmira.storage import remembered
from fedmira.wire import (
    ACCEPTED_ROUND,
    RUN,
    WIRE_STAGE,
    Encoded,
    Line,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
    joined,
    separated,
    text,
    whole_number,
)

__all__ = ["ServerEnd", "Work", "serve"]

Work = Callable[[Request, Payload | None], tuple[Reply | Failure, Payload | None]]
"""(request, the client's private memory) -> its answer, and its memory afterwards."""

_OWN, _LINE = "own", "line"
_log = logging.getLogger("fedmira")

MEMORY_LOST = "memory_lost"
"""A reply's figure, 1, where the client had to begin without its last private memory.

That is the memory which its last reply left behind.
"""


@dataclass(frozen=True, slots=True)
class _Sent:
    """A request that is on its way: the line with which its answer is read, and what it took."""

    line: Line
    volume: Volume


class ServerEnd:
    """The server's end: writes requests, reads answers, and knows what each client holds.

    An engine calls `send` for each request, and then either `receive` with what came back or
    `lost`. Its `memories` and `restore` are those of this object: the lines belong to the
    checkpoint, so that a server that resumes goes on with the nodes that still run.

    Args:
        wire: "float32", "float16" or "int8".
        run_id: the same in all parts of a run, also after a resume.
    """

    def __init__(self, wire: str, run_id: str) -> None:
        self._wire = wire
        self._run_id = run_id
        self._memories: Mapping[ClientId, Payload] = {}
        self._sent: dict[ClientId, _Sent] = {}

    @property
    def memories(self) -> Mapping[ClientId, Payload]:
        """Each client's line as tensors and numbers, for the checkpoint.

        What was handed out does not change later.
        """
        return self._memories

    def restore(self, memories: Mapping[ClientId, Payload]) -> None:
        """Take these lines, empty or from a checkpoint, and keep later ones in such a mapping."""
        self._memories = memories
        self._sent = {}

    def send(self, request: Request) -> Encoded:
        """The message of a request.

        Its header names the run and the round whose reply was last accepted.

        Raises:
            WireError: a tensor has a type that does not travel.
        """
        encoded, line = encode_request(
            request, self._wire, self._line(request.client_id), self._run_id
        )
        self._sent[request.client_id] = _Sent(line, encoded.volume)
        return encoded

    def receive(self, request: Request, encoded: Encoded) -> Reply | Failure:
        """The checked answer to a request that was sent, with its traffic.

        A reply is accepted here: the next request says so. After a failure the line is what it was
        before the request; where the client does not hold our reference, the next message goes
        whole.

        Args:
            request: as it was sent.
            encoded: the answer as it came.
        """
        sent = self._sent.pop(request.client_id)
        answer, line = decode_answer(request, encoded, sent.line)
        if isinstance(answer, Reply):
            self._remember(request.client_id, line)
        elif answer.stage == WIRE_STAGE:
            self._remember(request.client_id, Line(self._line(request.client_id).round))
        return replace(answer, traffic=Traffic(sent.volume, encoded.volume))

    def lost(self, request: Request, stage: str, reason: str) -> Failure:
        """A failure in place of an answer that never came.

        The line is what it was before. At stage "send" nothing has travelled.

        Args:
            request: as it was sent, or was to be sent.
            stage: where it went wrong.
            reason: what went wrong, in words.
        """
        down = self._sent.pop(request.client_id).volume
        return Failure(
            request.client_id,
            request.round,
            stage,
            reason,
            Traffic(Volume() if stage == "send" else down, Volume()),
        )

    def _line(self, client: ClientId) -> Line:
        return Line.of(self._memories[client]) if client in self._memories else Line()

    def _remember(self, client: ClientId, line: Line) -> None:
        self._memories = remembered(self._memories, {client: line.as_payload()})


def serve(encoded: Encoded, client: ClientId, folder: Path, work: Work) -> Encoded:
    """The client's end: read a request, do the work, remember, and write the answer.

    What goes wrong becomes a failure in the answer.

    The client's private memory and its line are on the disk before the answer leaves, under the
    request's round. A later request says whether that reply was accepted; where it was not, both
    are those of the round before.

    Args:
        encoded: the message of a request.
        client: the name that this node's operator gave it.
        folder: where the node remembers, of the operator's choice.
        work: trains.

    Raises:
        WireError: the message is no request, so that there is nobody to answer to.
    """
    header = encoded.header
    name, round_number = text(header, "client"), whole_number(header, "round")
    if name != client:
        failure = Failure(
            name,
            round_number,
            "request",
            f"this node is client {client!r}, but the request is for {name!r}",
        )
        return encode_answer(failure, "float32", Line())[0]
    memory = NodeMemory(folder, text(header, RUN), client)
    try:
        before = memory.recall(whole_number(header, ACCEPTED_ROUND))
    except FedmiraError as error:
        return encode_answer(Failure(name, round_number, "memory", str(error)), "float32", Line())[
            0
        ]
    try:
        forgot = before is None and whole_number(header, ACCEPTED_ROUND) > 0
        request, line = decode_request(encoded, Line.of(separated(before, _LINE)))
    except WireError as error:
        return encode_answer(
            Failure(name, round_number, WIRE_STAGE, str(error)), "float32", Line()
        )[0]
    try:
        answer, own = work(request, separated(before, _OWN))
        if forgot and own is not None and isinstance(answer, Reply):
            _log.warning(
                "%s: this node no longer has what it remembered of the run (in %s); it began anew",
                client,
                memory.folder,
            )
            answer = replace(answer, metrics={**answer.metrics, MEMORY_LOST: 1.0})
        message, line = encode_answer(answer, text(header, "wire"), line)
        if isinstance(answer, Reply):
            memory.keep(round_number, joined({_OWN: own, _LINE: line.as_payload()}))
    except FedmiraError as error:
        return encode_answer(Failure(name, round_number, "train", str(error)), "float32", Line())[0]
    return message
