"""Stands between a server and a node: what comes in, what goes out, and what is written of both.

All that a real node answers passes here, errors too. Nothing else of a node may be sent.
"""

from __future__ import annotations

import json
import logging
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from fedmira.errors import FedmiraError
from fedmira.federation.audit import AuditLog
from fedmira.federation.codes import INTERNAL, NodeError, told_of
from fedmira.federation.node import Node, NodeSettings, memory_folder, own_node, read_node_settings
from fedmira.federation.policy import admitted, policy_stamp, read_policy
from fedmira.federation.release import released, said_of_failure
from fedmira.shown import plain
from fedmira.wire import Encoded, pack, unpack

__all__ = ["GuardedNode"]

_SERVER = "server"
_log = logging.getLogger("fedmira")


@dataclass(frozen=True, slots=True)
class _Built:
    """A node, and what it was built from.

    Attributes:
        about: node config, settings and policy file in one text.
        node: as it was built.
    """

    about: str
    node: Node


class GuardedNode:
    """Answers the messages to one node; its base is loaded by the first one.

    The node is built anew when other settings come, or when its policy file was changed.
    """

    def __init__(self) -> None:
        self._built: _Built | None = None

    def answer(
        self, values: Mapping[str, object], sent: Mapping[str, object], kind: str, content: bytes
    ) -> bytes:
        """The answer to a message, as it may leave.

        Args:
            values: the node's config.
            sent: the run's settings by dotted key, as the server sent them.
            kind: of the message.
            content: the message.

        Raises:
            NodeError: there is none; its `told` is what the server may be told.
        """
        records: _Records | None = None
        try:
            settings = read_node_settings(values)
            records = _Records(settings)
            records.audit.add("in", kind, _SERVER, content)
            message = self._answer(settings, sent, kind, content, records.write)
            answer = pack(message)
            records.audit.add("out", kind, _SERVER, answer)
        except FedmiraError as error:
            raise _told(records, kind, str(error), told_of(error)) from error
        except Exception as error:  # noqa: BLE001 - Flower would send an unforeseen error's text
            self._built = None
            text = "".join(traceback.format_exception(error))
            raise _told(records, kind, text, INTERNAL) from error
        return answer

    def _answer(
        self,
        settings: NodeSettings,
        sent: Mapping[str, object],
        kind: str,
        content: bytes,
        write: Callable[[str], None],
    ) -> Encoded:
        path = settings.policy_path
        about = json.dumps([repr(settings), dict(sent), policy_stamp(path)], sort_keys=True)
        policy = read_policy(path)
        if self._built is None or self._built.about != about:
            self._built = None  # the former node's base must not stay beside the next one's
            config = admitted(policy, sent, settings.own_settings(policy.data))
            self._built = _Built(about, own_node(config, settings, policy))
        node = self._built.node
        message = unpack(content)
        policy.check_message(kind, message.header, node.rounds)
        answer = node.answer(kind, message)
        if words := said_of_failure(answer):
            write(f"{kind}: {words}")
        return released(kind, answer, node.name, policy.tells)


class _Records:
    """A node's own records beside its private memory: of messages, and of errors in words.

    Args:
        settings: of the node.
    """

    def __init__(self, settings: NodeSettings) -> None:
        folder, name = memory_folder(settings), settings.file_name
        self.audit = AuditLog(folder / f"{name}-audit.jsonl")
        self._log = folder / f"{name}.log"

    def write(self, text: str) -> None:
        """A line, or several, with the time before it."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(handle, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{at} {plain(text, lines=True)}\n")


def _told(records: _Records | None, kind: str, text: str, told: str) -> NodeError:
    """The error that leaves, once its text and the fact that it leaves are written down.

    Where they cannot be, the process's own log has to do.
    """
    try:
        if records is not None:
            records.write(f"{kind}: {text}")
            records.audit.add_error("out", kind, _SERVER, told)
    except (OSError, FedmiraError) as error:
        _log.error("the node's records cannot be written: %s", error)
    return NodeError(text, told)
