"""A federation whose nodes are each in a network namespace of their own.

One of them is cut off for a while.
"""

from __future__ import annotations

import pytest

pytest.importorskip("flwr", reason="Flower is not installed; pip install 'fedmira[flower]'")

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from fedmira.config import dump_config
from flower_processes import Federation, wait_until
from small import adapters_of, events_of, lenient_node, make_config

NAMES = ["apple-1", "apple-2", "birch-1"]
CUT_OFF = "birch-1"
SLOW = "apple-1"
ROUNDS = range(1, 7)


class Network:
    """A bridge of this machine, and for each name a namespace with a cable to the bridge.

    Made as it is built, gone when it is closed.

    Args:
        names: of the nodes.
    """

    def __init__(self, names: list[str]) -> None:
        mark = f"fm{os.getpid()}"  # names of links have 15 letters at most
        # 198.18.0.0/15 is set aside for tests of networks (RFC 2544)
        subnet = f"198.18.{os.getpid() % 256}"
        self.address = f"{subnet}.1"
        self.namespaces = {name: f"{mark}n{number}" for number, name in enumerate(names)}
        self._cables = {name: f"{mark}c{number}" for number, name in enumerate(names)}
        self._addresses = {name: f"{subnet}.{number + 2}/24" for number, name in enumerate(names)}
        self._bridge = f"{mark}b"
        self._undo = ExitStack()

    def build(self) -> None:
        """Make it.

        Raises:
            OSError: it is not allowed here, or `ip` is missing.
        """
        _ip("link", "add", self._bridge, "type", "bridge")
        self._undo.callback(_ip, "link", "delete", self._bridge)
        _ip("address", "add", f"{self.address}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for name, namespace in self.namespaces.items():
            _ip("netns", "add", namespace)
            self._undo.callback(_ip, "netns", "delete", namespace)
            _ip(
                "link",
                "add",
                self._cables[name],
                "type",
                "veth",
                "peer",
                "name",
                "inside",
                "netns",
                namespace,
            )
            self._undo.callback(_ip, "link", "delete", self._cables[name])
            _ip("link", "set", self._cables[name], "master", self._bridge, "up")
            _ip("-netns", namespace, "address", "add", self._addresses[name], "dev", "inside")
            _ip("-netns", namespace, "link", "set", "inside", "up")
            _ip("-netns", namespace, "link", "set", "lo", "up")

    def cut(self, name: str) -> None:
        """Nothing passes between this node and the others."""
        _ip("link", "set", self._cables[name], "down")

    def heal(self, name: str) -> None:
        """It does again."""
        _ip("link", "set", self._cables[name], "up")

    def close(self) -> None:
        """Remove what was made, last things first.

        Where something stays, the rest goes all the same.
        """
        self._undo.close()


def _ip(*arguments: str) -> None:
    program = shutil.which("ip")
    if program is None:
        raise FileNotFoundError("the program `ip` is not installed")
    ended = subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    if ended.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {ended.stderr.strip()}")


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network(NAMES)
    try:
        try:
            made.build()
        except OSError as error:
            pytest.skip(
                f"network namespaces cannot be made here ({error}); it takes root and iproute2"
            )
        yield made
    finally:
        made.close()


@pytest.fixture
def federation(network: Network, tmp_path: Path) -> Iterator[Federation]:
    processes = Federation(tmp_path / "flower", secure=True, address=network.address)
    try:
        yield processes
    finally:
        processes.close()


def rounds_of(run: Path) -> list[int]:
    return (
        [event["round"] for event in events_of(run, "round")]
        if (run / "events.jsonl").exists()
        else []
    )


def online(federation: Federation) -> int:
    """How many nodes Flower sees."""
    nodes = json.loads(federation.call("flwr", "supernode", "list", "--format", "json"))["nodes"]
    return sum(node["status"] == "online" for node in nodes)


@pytest.mark.slow
def test_a_partition_that_heals_leaves_the_run_consistent(
    network: Network,
    federation: Federation,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
) -> None:
    """A node is cut off when it has taken round 3's request and is back when the round has ended.

    It trains, answers too late, and goes on
    from what the server accepted last. Another node works so slowly meanwhile that the run does not
    end before.
    """
    settings = {
        "rounds.count": len(ROUNDS),
        "rounds.min_replies": 1,
        "local.steps": 1,
        "algorithm.name": "local",
    }
    waits = {"federation.clients": NAMES, "federation.wait_s": 300, "federation.reply_s": 400}
    text, run = tmp_path / "app.toml", tmp_path / "run"
    config = make_config(base_folder, clients_folder, {**settings, **waits})
    text.write_text(dump_config(config), encoding="utf-8")
    federation.call(
        "fedmira", "flower", "init", tmp_path / "app", "--config", text, "--output", run
    )
    federation.start_superlink()
    for name in NAMES:
        federation.register(name)
        about = {"name": name, "data-path": str(clients_folder), "memory": str(tmp_path / "memory")}
        about |= lenient_node(config, tmp_path)
        federation.start_node(name, about, namespace=network.namespaces[name])

    process = federation.start_run(tmp_path / "app")
    wait_until(
        lambda: "Received successfully" in federation.log(CUT_OFF).partition("ROUND 3]")[2],
        "round 3 on the node",
        400,
    )
    network.cut(CUT_OFF)
    slow = ("fedmira.federation.resident", hashlib.sha256(SLOW.encode()).hexdigest()[:16])
    with federation.paused(*slow):
        wait_until(
            lambda: online(federation) == len(NAMES) - 1, "Flower's word that the node is gone"
        )
        network.heal(CUT_OFF)
        wait_until(
            lambda: online(federation) == len(NAMES), "the node's return"
        )  # its messages are sent again ever more rarely
        wait_until(
            lambda: "Sent successfully" in federation.log(CUT_OFF).partition("ROUND 3]")[2],
            "the node's late answer",
        )
    wait_until(lambda: "ROUND 4]" in federation.log(SLOW), "round 4 on the slow node")
    with federation.paused(*slow):  # so that no round ends before the node has said who it is
        wait_until(
            lambda: (
                "Sent successfully" in federation.log(CUT_OFF).rpartition("ROUND identity]")[2]
                and federation.log(CUT_OFF).count("ROUND identity]") == 4
            ),
            "the node's name, asked anew",
        )
    wait_until(lambda: process.poll() is not None, "the run", 400)

    assert (run / "report.html").is_file(), federation.log("run")
    assert rounds_of(run) == list(ROUNDS), "every round stands there once"
    trained = {(event["round"], event["client"]): event for event in events_of(run, "train")}
    failures = events_of(run, "failure")
    assert len(trained) == len(events_of(run, "train")) and {
        failure["client"] for failure in failures
    } == {CUT_OFF}
    missed = {
        failure["round"]: failure["reason"]
        for failure in failures
        if failure["stage"] != "evaluate"
    }
    assert 3 in missed and all(missed.values())
    assert federation.log(CUT_OFF).count("ROUND 3]") == 2, (
        "it received round 3 and had an answer, which nobody took"
    )
    expected = {(number, name) for number in ROUNDS for name in NAMES} - {
        (number, CUT_OFF) for number in missed
    }
    assert set(trained) == expected, "the others trained in every round"
    assert any(number > 3 for number, name in trained if name == CUT_OFF), "it is back"
    for name in NAMES:
        events = [trained[number, name] for number in ROUNDS if (number, name) in trained]
        assert [event["loaded_hash"] for event in events[1:]] == [
            event["sent_hash"] for event in events[:-1]
        ], "each from its own adapter"
    adapters = adapters_of(run)
    assert set(adapters) == set(NAMES) and all(
        np.isfinite(array).all() for adapter in adapters.values() for array in adapter.values()
    )
