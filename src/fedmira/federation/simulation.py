"""The clients of a Flower simulation.

Partitions of the run's own data, of which all that a process serves share its one base.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from fedmira.config import Config, unflattened
from fedmira.data import load_clients
from fedmira.errors import ConfigError
from fedmira.experiment import client_ranks, prepare_kind, token_budget
from fedmira.federation.node import Node, memory_beside
from fedmira.model import check_ids
from fedmira.wire import pack, unpack

__all__ = ["SimulatedClients", "answer_simulated"]

_PARTITION, _PARTITIONS = "partition-id", "num-partitions"
_log = logging.getLogger("fedmira")


class SimulatedClients:
    """All clients of a run on one resident base, each as a node that answers for it alone.

    Args:
        config: of the run.
        memory: the folder of the clients' private memories, which exists. A client may be served by
            another process next time, so all processes of the simulation must see this folder.

    Raises:
        InputError: the base or the data cannot be loaded, or the config does not fit them.
    """

    def __init__(self, config: Config, memory: Path) -> None:
        self._config = config
        self._memory = memory
        self._kind = prepare_kind(config)
        self._clients = load_clients(config.data, config.seed, self._kind.base.tokenizer).clients
        check_ids(self._kind.base, {client.client_id: client.rows for client in self._clients})
        self._ranks = client_ranks(
            config.adapter,
            [client.client_id for client in self._clients],
            self._kind.targets,
            config.seed,
        )
        self._budget = token_budget(config, self._kind)

    def node(self, partition: int, partitions: int) -> Node:
        """The client of this number, in the order of the run in one process.

        Made anew each time, because that costs next to nothing.

        Args:
            partition: from 0.
            partitions: how many Flower simulates.

        Raises:
            ConfigError: that is not the number of clients, or there is no such client.
        """
        count = len(self._clients)
        if partitions != count:
            raise ConfigError(
                f"Flower simulates {partitions} nodes (num-supernodes), but the run's data "
                f"has {count} clients; start it with "
                f"--federation-config 'num-supernodes={count}'"
            )
        if not 0 <= partition < count:
            raise ConfigError(
                f"node config: partition-id is {partition}; must be from 0 to {count - 1}, "
                f"as the run has {count} clients"
            )
        client = self._clients[partition]
        return Node(
            config=self._config,
            kind=self._kind,
            data=client,
            rank=self._ranks[client.client_id],
            budget=self._budget,
            memory=self._memory,
        )


def answer_simulated(
    node: Mapping[str, object],
    settings: Mapping[str, object],
    output: Path,
    kind: str,
    content: bytes,
) -> bytes:
    """Answer a message to one client of a simulation.

    The first message to this process loads the base and the data, later ones do not.

    Args:
        node: the node's config, of which Flower gives `partition-id` and `num-partitions`.
        settings: the run's settings by dotted key.
        output: the run folder, beside which the clients' private memories are.
        kind: of the message.
        content: the message.

    Raises:
        FedmiraError: it cannot be done.
    """
    partition, partitions = node.get(_PARTITION), node.get(_PARTITIONS)
    if not isinstance(partition, int) or not isinstance(partitions, int):
        raise ConfigError(
            "the run is a Flower simulation, but this node is not simulated: its config "
            f"lacks {_PARTITION} or {_PARTITIONS}; start the "
            "run with --run-config 'simulation=false'"
        )
    memory = memory_beside(output)
    if not memory.is_dir():
        raise ConfigError(
            f"{memory}: the folder of the clients' private memories cannot be seen from "
            "here; set output to a folder on a file system that "
            "all machines of the simulation share"
        )
    clients = _clients_of(json.dumps(dict(settings), sort_keys=True), memory)
    return pack(clients.node(partition, partitions).answer(kind, unpack(content)))


@lru_cache(maxsize=1)  # a process of Flower's serves one run
def _clients_of(settings: str, memory: Path) -> SimulatedClients:
    """The clients of these settings, which are JSON; kept from message to message."""
    start = time.monotonic()
    clients = SimulatedClients(unflattened(json.loads(settings)), memory)
    _log.info(
        "process %d holds the base and the data now, after %.1f s",
        os.getpid(),
        time.monotonic() - start,
    )
    return clients
