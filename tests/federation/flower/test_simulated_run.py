"""A federation whose nodes Flower simulates.

The run of one process, whichever process serves a client, and what is refused.
"""

from __future__ import annotations

import pytest

pytest.importorskip("flwr", reason="Flower is not installed; pip install 'fedmira[flower]'")

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Error, Message

from fedmira.config import Config
from fedmira.errors import ConfigError, RoundError
from fedmira.experiment import build_experiment, run_experiment
from fedmira.federation import simulation
from fedmira.federation.flower.records import record_of
from fedmira.federation.server import run_federation
from fedmira.wire import IDENTITY, TRAIN
from loopback import LoopbackGrid, Meddler
from small import CLIENTS, adapter_bytes, events_of, make_config, over_wire, with_clients

SHORT = {"rounds.count": 2, "federation.wait_s": 60, "federation.reply_s": 60}


@pytest.fixture(autouse=True)
def _new_process() -> Iterator[None]:
    """No test finds what another left in this process."""
    simulation._clients_of.cache_clear()
    yield
    simulation._clients_of.cache_clear()


def nodes_of(count: int, partitions: int | None = None) -> dict[int, Mapping[str, Any]]:
    """What Flower tells its simulated nodes; their ids say nothing about their numbers."""
    return {
        900 - i: {"partition-id": i, "num-partitions": partitions or count} for i in range(count)
    }


def simulate(
    config: Config, output: Path, meddler: Meddler | None = None, **more: Any
) -> LoopbackGrid:
    grid = LoopbackGrid(
        config, more.pop("nodes", nodes_of(len(CLIENTS))), meddler, simulated_in=output
    )
    run_federation(config, grid, output, resume=more.pop("resume", False), simulated=True)
    return grid


def weights_of(run: Path) -> dict[str, bytes]:
    return {
        name: content
        for name, content in adapter_bytes(run).items()
        if name.endswith(".safetensors")
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"algorithm.space": "factor", "local.optimizer_state": "kept", "engine.wire": "int8"},
        {
            "rounds.count": 3,
            "data.partition": "category",
            "data.clients_per_category": 2,
            "data.max_rows": [6, 4],
        },
    ],
    ids=["mira", "private memory", "rows dealt among clients"],
)
def test_a_simulation_ends_with_the_adapters_of_the_run_in_one_process(
    settings: dict[str, Any], base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    """A process that holds nothing serves each training message.

    So no client finds anything but its folder.
    """
    config = make_config(
        base_folder, clients_folder, {**SHORT, **settings, "rounds.participation": 0.6}
    )

    def move(client: str, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == TRAIN:
            simulation._clients_of.cache_clear()
        return reply

    experiment = build_experiment(config)
    count = len(experiment.parties)
    simulate(config, tmp_path / "apart", move, nodes=nodes_of(count))
    one_at_a_time = with_clients(experiment, over_wire(experiment, 1))
    run_experiment(one_at_a_time, tmp_path / "together")
    apart = weights_of(tmp_path / "apart")
    assert len(apart) == count and apart == weights_of(tmp_path / "together")
    assert (
        events_of(tmp_path / "apart", "failure") == []
        and (tmp_path / "apart" / "report.html").is_file()
    )
    assert list((tmp_path / "apart-memory").glob("*/*/round-*.safetensors"))


def test_node_number_k_is_client_number_k_and_all_share_one_base(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    clients = simulation.SimulatedClients(make_config(base_folder, clients_folder), tmp_path)
    nodes = [clients.node(number, len(CLIENTS)) for number in range(len(CLIENTS))]
    assert [node.name for node in nodes] == sorted(CLIENTS)
    assert len({id(node._clients.kind) for node in nodes}) == 1


def test_messages_to_all_clients_load_the_base_once(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    grid = simulate(make_config(base_folder, clients_folder, SHORT), tmp_path / "run")
    use = simulation._clients_of.cache_info()
    assert use.misses == 1 and use.hits == len(grid.delivered) - 1 and use.hits > 3 * len(CLIENTS)


def test_a_base_that_takes_longer_to_load_than_the_greeting_lives_is_no_refusal(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    waiting = {str(node) for node in nodes_of(len(CLIENTS))}

    def expire_once(client: str, message: Message, reply: Message) -> Message:
        if message.metadata.message_type != IDENTITY or client not in waiting:
            return reply
        waiting.remove(client)
        return Message(Error(3, "Message Unavailable"), reply_to=message)

    simulate(make_config(base_folder, clients_folder, SHORT), tmp_path / "run", expire_once)
    assert not waiting and {
        event["client"] for event in events_of(tmp_path / "run", "train")
    } == set(CLIENTS)


@pytest.mark.parametrize(
    ("nodes", "problem"),
    [
        (
            nodes_of(3),
            "Flower simulates 3 nodes .num-supernodes., but the run's data has 5 clients; "
            ".*num-supernodes=5",
        ),
        (
            nodes_of(7),
            "Flower simulates 7 nodes .num-supernodes., but the run's data has 5 clients",
        ),
        ({1: {"partition-id": 5, "num-partitions": 5}}, "partition-id is 5; must be from 0 to 4"),
        ({1: {"name": "apple-1"}}, "this node is not simulated: its config lacks partition-id"),
    ],
)
def test_nodes_that_are_not_the_runs_clients_are_refused_at_once(
    nodes: dict[int, Mapping[str, Any]],
    problem: str,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
) -> None:
    config = make_config(base_folder, clients_folder, {"federation.wait_s": 1e6})
    with pytest.raises(ConfigError, match=f"0 of 5 simulated clients are there.*{problem}"):
        simulate(config, tmp_path / "run", nodes=nodes)
    assert not (tmp_path / "run").exists()


def test_a_simulated_node_of_a_run_that_is_no_simulation_is_refused(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(base_folder, clients_folder, {"federation.wait_s": 0.5})
    with pytest.raises(
        ConfigError,
        match="this is a node of a Flower simulation, and the run is none; .*simulation=true",
    ):
        run_federation(config, LoopbackGrid(config, nodes_of(2)), tmp_path / "run", resume=False)


def test_a_process_that_does_not_see_the_folder_of_memories_says_so(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(base_folder, clients_folder, SHORT)
    grid = LoopbackGrid(config, nodes_of(len(CLIENTS)), simulated_in=tmp_path / "elsewhere")
    with pytest.raises(
        ConfigError,
        match="elsewhere-memory: the folder of the clients' private memories cannot be seen from "
        "here",
    ):
        run_federation(config, grid, tmp_path / "run", resume=False, simulated=True)


def test_an_interrupted_simulation_ends_like_an_uninterrupted_one(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {
        **SHORT,
        "rounds.min_replies": 5,
        "algorithm.space": "factor",
        "local.optimizer_state": "kept",
    }
    config = make_config(base_folder, clients_folder, settings)
    trained: list[str] = []

    def fail_once(client: str, message: Message, reply: Message) -> Message:
        if message.metadata.message_type != TRAIN:
            return reply
        trained.append(client)
        return (
            Message(record_of(b"nonsense"), reply_to=message)
            if len(trained) == len(CLIENTS) + 2
            else reply
        )

    with pytest.raises(RoundError, match="round 2: 4 of 5"):
        simulate(config, tmp_path / "run", fail_once)
    simulate(config, tmp_path / "run", resume=True)
    simulate(config, tmp_path / "whole")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
