"""The nodes of a federation by the names that their operators gave them.

Who is connected, who may take part, and asking them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedmira.data import ClientSummary, id_problem
from fedmira.errors import WireError
from fedmira.federation.audit import AuditLog
from fedmira.federation.flower.identity import Identity
from fedmira.federation.flower.records import bytes_of, record_of
from fedmira.messages import ClientId
from fedmira.shown import cut, plain
from fedmira.wire import (
    IDENTITY,
    LONGEST_TEXT,
    REFUSAL,
    Encoded,
    pack,
    unpack,
)

__all__ = ["Grid", "Nodes", "Problem"]

_PAUSE_SECONDS = 0.1
_GREETING_SECONDS = 120.0
"""How long a node may take to say who it is before it is asked again.

It goes on loading its base model meanwhile.
"""
_AGAIN_SECONDS = 30.0
"""After what time a node that may not take part is asked again.

The obstacle may be gone, such as a name that another node had.
"""
_CLOCKS = (
    "it is asked again; where this goes on, look at its log, and compare its clock with the "
    "SuperLink's"
)
_UNAVAILABLE = 3
_LOST = frozenset({_UNAVAILABLE, 4, 5, 8})
"""Flower's error codes for an answer that never came.

Message, reply or node unavailable, and a node's program that stopped responding.
"""
_TIMES_AS_LARGE, _ROOM = 8, 16 * 2**20
"""A reply may have so many times the bytes of its request, and so many more."""
_MOST_TURNED_AWAY = 1000
"""So many newcomers are named that were turned away; later ones are refused without a word here."""
_log = logging.getLogger("fedmira")


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a client's answer did not come, and at which stage.

    Attributes:
        stage: where it went wrong.
        reason: what went wrong, in words.
    """

    stage: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Bar:
    """Why a node does not take part, and from when on it is asked again."""

    reason: str
    until: float


class Nodes:
    """Knows which node is which client and carries messages.

    It greets nodes that come and refuses those that do not fit.

    A node is identified by what it answers, never by its node id, which changes when an
    unauthenticated node starts again.

    Args:
        grid: Flower's connection of this run.
        base_sha256, tokenizer_sha256: what all nodes must have.
        allowed: names that may take part; empty allows all, until `close` is called.
        reply_s: how long messages wait for their answers.
        audit: the server's record of what travels; None keeps none.
        may_join: of a name, whether it may come once the run has begun; None lets nobody.
    """

    def __init__(  # noqa: PLR0913 - who may take part, and how long they may take
        self,
        grid: Grid,
        base_sha256: str,
        tokenizer_sha256: str,
        allowed: Sequence[ClientId],
        reply_s: float,
        audit: AuditLog | None = None,
        may_join: Callable[[ClientId], bool] | None = None,
    ) -> None:
        self._grid = grid
        self._ground = {"base model": base_sha256, "tokenizer": tokenizer_sha256}
        self._allowed = tuple(allowed)
        self._reply_s = reply_s
        self._audit = audit
        self._may_join = may_join
        self._known: dict[int, Identity] = {}
        self._barred: dict[int, _Bar] = {}
        self._greeted: dict[str, int] = {}
        self._online: dict[int, str] = {}
        self._started: dict[int, str] = {}
        self._closed: Mapping[ClientId, ClientSummary] = {}
        self._turned_away: dict[ClientId, str] = {}
        self._told_away: list[str] = []

    @property
    def parties(self) -> dict[ClientId, ClientSummary]:
        """What the run's clients that are connected now say of themselves, sorted by name.

        Before it begins, those are the names that it waits for, or all.
        """
        names = self._closed or self._allowed
        return {
            name: party for name, party in self._connected().items() if not names or name in names
        }

    def waiting(self) -> dict[ClientId, ClientSummary]:
        """What those say of themselves who may join the run that has begun, sorted by name."""
        self._look()
        found = self._connected()
        return {name: party for name, party in found.items() if name not in self._closed}

    def turn_away(self, client: ClientId, reason: str) -> None:
        """Refuses one of those who wait, and says so on both sides.

        Args:
            client: its name.
            reason: in words.
        """
        for node in [n for n, of in self._known.items() if of.party.client_id == client]:
            del self._known[node]
            self._refuse(node, client, reason, time.monotonic() + _AGAIN_SECONDS)

    def turned_away(self) -> list[str]:
        """Why newcomers were refused since this was asked last, a sentence for each name once."""
        told, self._told_away = self._told_away, []
        return told

    def _connected(self) -> dict[ClientId, ClientSummary]:
        found = {
            self._known[node].party.client_id: self._known[node].party
            for node in self._online
            if node in self._known
        }
        return dict(sorted(found.items()))

    @property
    def refusals(self) -> list[str]:
        """Why nodes that are connected do not take part."""
        return sorted(bar.reason for bar in self._barred.values())

    def gather(
        self, wanted: Sequence[ClientId], count: int, wait_s: float, *, until_refused: bool = False
    ) -> dict[ClientId, ClientSummary]:
        """Wait until so many of these clients are connected, or of any where no names are given.

        Args:
            wanted: ids of clients; none where any will do.
            count: how many are waited for.
            wait_s: seconds at most.
            until_refused: no longer than until a node is refused, where no other can come in its
                place.

        Returns:
            What the connected clients say of themselves; perhaps of fewer than were wanted when the
            time is over.
        """
        end = time.monotonic() + wait_s
        while True:
            self._look()
            parties = self.parties
            present = len(set(wanted) & set(parties)) if wanted else len(parties)
            now = time.monotonic()
            refused = any(
                now < bar.until for bar in self._barred.values()
            )  # the others are asked again at once
            if present >= count or (until_refused and refused) or now >= end:
                return parties
            time.sleep(_PAUSE_SECONDS)

    def close(self, parties: Mapping[ClientId, ClientSummary]) -> None:
        """From now on only these clients may take part, with the rows that they have now."""
        self._closed = dict(parties)

    def ask(
        self, kind: str, messages: Mapping[ClientId, Encoded], group: str = ""
    ) -> dict[ClientId, Encoded | Problem]:
        """Send each client its own message and wait for the answers.

        Whatever goes wrong stands in place of an answer.

        Args:
            kind: the messages' type, which names what the node does with them.
            messages: client id -> its message.
            group: Flower's group id, such as the round.
        """
        self._look()
        node_of = {
            self._known[node].party.client_id: node for node in self._online if node in self._known
        }
        answers: dict[ClientId, Encoded | Problem] = {
            client: Problem("send", "its node is not connected")
            for client in messages
            if client not in node_of
        }
        waiting: dict[str, ClientId] = {}
        asked = [client for client in messages if client in node_of]
        packed = {client: pack(messages[client]) for client in asked}
        sent = [
            Message(
                record_of(packed[client]),
                node_of[client],
                kind,
                ttl=self._reply_s,
                group_id=group,
            )
            for client in asked
        ]
        for client, message_id in zip(asked, self._push(sent), strict=True):
            if message_id:
                waiting[message_id] = client
                if self._audit:
                    self._audit.add("out", kind, client, packed[client])
            else:
                answers[client] = Problem(
                    "send", "the message could not be handed to the SuperLink; it may be too large"
                )
        most = {client: _ROOM + _TIMES_AS_LARGE * len(of) for client, of in packed.items()}
        late = Problem("reply", f"no reply within {self._reply_s:g} s (federation.reply_s)")
        end = time.monotonic() + self._reply_s
        while waiting:
            over = (
                time.monotonic() >= end
                # A pull can take long while somebody uploads: what came meanwhile is pulled all the
                # same
            )
            for reply in self._pull(waiting):
                client = waiting.pop(reply.metadata.reply_to_message_id)
                answers[client] = (
                    late if _expired(reply) else self._opened(reply, kind, client, most[client])
                )
            if over:
                break
            time.sleep(_PAUSE_SECONDS if waiting else 0)
        return answers | dict.fromkeys(waiting.values(), late)

    def _look(self) -> None:
        """Note who is connected, ask newcomers who they are, and take in what they answer."""
        nodes = list(self._grid.get_nodes())
        self._online = {node.node_id: node.name for node in nodes}
        started = {node.node_id: node.last_activated_at for node in nodes}
        for node in self._started.keys() & started.keys():
            if (
                self._started[node] != started[node]
            ):  # it was started again, perhaps with other rows or another base
                self._known.pop(node, None)
                self._barred.pop(node, None)
                self._greeted = {
                    message_id: to for message_id, to in self._greeted.items() if to != node
                }
        self._started |= started
        for gone in set(self._barred) - set(self._online):  # whoever comes again is asked again
            del self._barred[gone]
        now = time.monotonic()
        pending = {
            *self._greeted.values(),
            *self._known,
            *(node for node, bar in self._barred.items() if now < bar.until),
        }
        strangers = [node for node in self._online if node not in pending]
        greetings = [self._notice(IDENTITY, {}, node) for node in strangers]
        self._greeted |= {
            message_id: node
            for message_id, node in zip(self._push(greetings), strangers, strict=True)
            if message_id
        }
        for reply in self._pull(self._greeted):
            node = self._greeted.pop(reply.metadata.reply_to_message_id)
            if node not in self._online:
                continue
            if reply.has_error() and reply.error.code in _LOST:
                self._bar(
                    node,
                    f"node {self._online[node] or node} did not say who it is "
                    f"({reply.error.reason}); {_CLOCKS}",
                    now,
                )
                continue
            self._welcome(
                node, self._opened(reply, IDENTITY, self._online[node] or str(node), _ROOM)
            )

    def _welcome(self, node: int, answer: Encoded | Problem) -> None:
        """Take a node in, or refuse it and say so on both sides."""
        again = time.monotonic() + _AGAIN_SECONDS
        if isinstance(answer, Problem):
            self._bar(node, f"a node cannot take part: {answer.reason}", again)
            return
        try:
            identity = Identity.of(answer)
        except WireError as error:
            self._refuse(node, "", str(error), again)
            return
        if not (problem := self._problem(node, identity)):
            self._known = {
                other: of
                for other, of in self._known.items()
                if of.party.client_id != identity.party.client_id
            } | {node: identity}
            self._barred.pop(node, None)
            _log.info(
                "client %s is connected: %d training rows",
                identity.party.client_id,
                identity.party.train_rows,
            )
            return
        self._refuse(node, identity.party.client_id, problem, again)

    def _refuse(self, node: int, name: ClientId, problem: str, until: float) -> None:
        """Leave a node out and tell it; of a newcomer each reason is said once here.

        Args:
            node: its number.
            name: its client's; "" where it did not say.
            problem: in words.
            until: when it is asked again.
        """
        late = self._may_join is not None and bool(self._closed) and name not in {"", *self._closed}
        known = late and (
            self._turned_away.get(name) == problem or len(self._turned_away) >= _MOST_TURNED_AWAY
        )
        if late and not known:
            self._turned_away[name] = problem
            self._told_away.append(problem)
        if self._bar(node, f"refused a node: {problem}", until, said=known):
            self._push([self._notice(REFUSAL, {"reason": problem}, node)])

    def _bar(self, node: int, reason: str, until: float, *, said: bool = False) -> bool:
        """Leave a node out and log it unless that was said; whether the reason is a new one."""
        new = node not in self._barred or self._barred[node].reason != reason
        self._barred[node] = _Bar(reason, until)
        if new and not said:
            _log.warning("%s", reason)
        return new

    def _problem(self, node: int, identity: Identity) -> str:
        """Why this node may not take part; "" where it may."""
        name = identity.party.client_id
        if problem := self._name_problem(node, name):
            return problem
        for (what, expected), found in zip(
            self._ground.items(), (identity.base_sha256, identity.tokenizer_sha256), strict=True
        ):
            if found != expected:
                return (
                    f"client {name!r} has another {what} (sha256 {found[:12]}, the server's is "
                    f"{expected[:12]}); install the same on both"
                )
        if identity.party.train_rows == 0:
            return f"client {name!r} has no training rows"
        if self._closed and name not in self._closed:
            if self._may_join is not None:
                return "" if self._may_join(name) else _not_invited(name)
            return (
                f"client {name!r} was not there when the run began ({', '.join(self._closed)}); "
                "it can take part in the next run"
            )
        if self._closed and identity.party != self._closed[name]:
            return (
                f"the rows of client {name!r} changed since the run began; put them back, or start "
                "a new run"
            )
        return ""

    def _name_problem(self, node: int, name: ClientId) -> str:
        """Why no node of this name may take part.

        "" where it may. A name comes from elsewhere, and names a folder here.
        """
        registered = self._online[node]
        if unfit := id_problem(name):
            return unfit
        if registered and registered != name:
            return (
                f"the node is registered as {registered!r} but calls itself {name!r}; make the two "
                "names equal"
            )
        invited = self._may_join is not None and (bool(self._closed) or self._may_join(name))
        if self._allowed and name not in self._allowed and not invited:
            return f"client {name!r} is not in federation.clients ({', '.join(self._allowed)})"
        if any(
            of.party.client_id == name and other != node and other in self._online
            for other, of in self._known.items()
        ):
            return f"a node called {name!r} is connected already; give each node a name of its own"
        taken = [*(of.party.client_id for of in self._known.values()), *self._closed]
        alike = [each for each in taken if each != name and each.casefold() == name.casefold()]
        if alike:
            return (
                f"clients {alike[0]!r} and {name!r} would share a folder where case is ignored; "
                "rename one"
            )
        return ""

    def _opened(self, reply: Message, kind: str, peer: str, most: int) -> Encoded | Problem:
        """The message in a reply, or what is wrong.

        The node's code, Flower's words, or that it cannot be read.

        Args:
            reply: as it came.
            kind: of what it answers.
            peer: the client, or the node before it has said who it is.
            most: bytes that it may have.
        """
        if reply.has_error():
            reason = reply.error.reason or f"Flower's error {reply.error.code}"
            told = plain(cut(reason, LONGEST_TEXT))
            if self._audit:
                self._audit.add_error("in", kind, plain(peer), told)
            return Problem("node", told)
        try:
            content = bytes_of(reply.content)
        except KeyError:
            return Problem("reply", "the reply holds no message of fedmira's")
        if self._audit:
            self._audit.add("in", kind, plain(peer), content)
        if len(content) > most:
            return Problem(
                "reply", f"the reply has {len(content)} bytes; at most {most} are looked at"
            )
        try:
            return unpack(content)
        except WireError as error:
            return Problem("reply", plain(cut(str(error), LONGEST_TEXT)))

    def _notice(self, kind: str, header: Mapping[str, str], node: int) -> Message:
        lifetime = min(_GREETING_SECONDS, self._reply_s)
        return Message(
            record_of(pack(Encoded({}, dict(header)))),
            node,
            kind,
            ttl=lifetime,
            group_id="identity",
        )

    def _push(self, messages: Sequence[Message]) -> list[str]:
        """One message id each, "" for what the SuperLink did not take."""
        if not messages:
            return []
        ids = [message_id or "" for message_id in self._grid.push_messages(messages)]
        return ids + [""] * (len(messages) - len(ids))

    def _pull(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that have come."""
        wanted = list(message_ids)
        return (
            [
                reply
                for reply in self._grid.pull_messages(wanted)
                if reply.metadata.reply_to_message_id in wanted
            ]
            if wanted
            else []
        )


def _not_invited(name: ClientId) -> str:
    """Why a newcomer is turned away whose name may not join; who may is not told."""
    return (
        f"code not-invited: client {name!r} may not join this run (federation.open); ask whoever "
        "runs it, or take part in the next one"
    )


def _expired(reply: Message) -> bool:
    """Whether the message's time was over before its answer came.

    Its lifetime is how long the server waits.
    """
    return bool(reply.has_error() and reply.error.code == _UNAVAILABLE)
