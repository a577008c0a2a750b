"""Flower's grid within one process.

Messages go through fedmira's own client app, one node after another, with Flower's real messages.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedmira.config import Config, flattened
from fedmira.federation.policy import SERVER_ONLY, is_own
from fedmira.flower_app import client_app
from small import lenient_node

__all__ = ["LoopbackGrid"]

Meddler = Callable[[str, Message, Message], Message | None]
"""(client, message, its reply) -> what arrives in place of the reply; None loses it."""


class LoopbackGrid(Grid):
    """Nodes that live in this process.

    Args:
        config: of the run.
        nodes: node id -> node config.
        meddler: changes replies on their way.
        registered: node id -> the name that it is registered under, where nodes authenticate.
        simulated_in: the run folder, where the nodes are those of a simulation.
    """

    def __init__(
        self,
        config: Config,
        nodes: Mapping[int, Mapping[str, Any]],
        meddler: Meddler | None = None,
        registered: Mapping[int, str] | None = None,
        simulated_in: Path | None = None,
    ) -> None:
        self.nodes = {node: dict(of) for node, of in nodes.items()}
        # Flower's processes know which task they are; a message asks for it.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.delivered: list[tuple[str, int]] = []
        of_the_app = {
            "output": str(simulated_in or ""),
            "resume": False,
            "simulation": simulated_in is not None,
        }
        shared = {
            f"{SERVER_ONLY}{key}" if is_own(key) and simulated_in is None else key: value
            for key, value in flattened(config).items()
        }
        self._run_config = {**of_the_app, **shared}
        self._of_all: dict[str, Any] = {"resident": False}
        if simulated_in is None:
            place = mkdtemp()
            weakref.finalize(self, shutil.rmtree, place)
            self._of_all |= lenient_node(config, Path(place))
        self._meddler = meddler
        self._registered = registered or {}
        self._replies: dict[str, Message] = {}
        self.started: dict[int, str] = {}

    def set_run(self, run: Any) -> None:
        raise NotImplementedError("the run of a test is this object")

    @property
    def run(self) -> Any:
        raise NotImplementedError("the run of a test is this object")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return Message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterable[Any]:
        started = self.started
        return [
            SimpleNamespace(
                node_id=node,
                name=self._registered.get(node, ""),
                last_activated_at=started.get(node, ""),
            )
            for node in self.nodes
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = message.object_id
            ids.append(message.object_id)
            self.delivered.append((message.metadata.message_type, node))
            reply = self._reply(node, message)
            changed = (
                self._meddler(str(self.nodes[node].get("name", node)), message, reply)
                if self._meddler
                else reply
            )
            if changed is not None:
                self._replies[message.object_id] = changed
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [
            self._replies.pop(message_id)
            for message_id in list(message_ids)
            if message_id in self._replies
        ]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _reply(self, node: int, message: Message) -> Message:
        context = Context(
            0, node, {**self._of_all, **self.nodes[node]}, RecordDict(), dict(self._run_config)
        )
        return client_app(message, context)
