"""A federation of real processes on this machine.

Flower's SuperLink and SuperNodes, with TLS and node authentication.
"""

from __future__ import annotations

import pytest

pytest.importorskip("flwr", reason="Flower is not installed; pip install 'fedmira[flower]'")

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedmira.config import Config, dump_config
from fedmira.experiment import build_experiment, run_experiment
from flower_processes import Federation, wait_until
from small import (
    adapter_bytes,
    events_of,
    lenient_node,
    local_of,
    make_config,
    table_of,
    with_clients,
)

TASKS = 4
SETTINGS = {
    "data.source": "natural-instructions",
    "data.validation_fraction": 0.0,
    "data.max_rows": 24,
    "data.test_rows": 6,
    "data.max_length": 160,
    "data.input_limit": 400,
    "federation.nodes": TASKS,
    "federation.wait_s": 700,
    "federation.reply_s": 120,
}


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    processes = Federation(tmp_path / "flower", secure=True)
    try:
        yield processes
    finally:
        processes.close()


@pytest.fixture
def tasks(shared_folder: Path, tmp_path: Path) -> list[str]:
    """Four real tasks, in one folder and in four.

    In one for the run in one process, and each in a folder of its own for its node.
    """
    found = sorted(
        (shared_folder / "data" / "natural-instructions" / "tasks").glob("*.json"),
        key=lambda path: path.stat().st_size,
    )[:TASKS]
    for path in found:
        for folder in (tmp_path / "all", tmp_path / "apart" / path.stem):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder)
    return sorted(path.stem for path in found)


def write_app(federation: Federation, config: Config, folder: Path) -> None:
    text = folder.with_suffix(".toml")
    text.write_text(dump_config(config), encoding="utf-8")
    federation.call(
        "fedmira", "flower", "init", folder, "--config", text, "--output", folder.with_name("run")
    )


def start_nodes(
    federation: Federation, config: Config, data: Mapping[str, Path], memory: Path
) -> None:
    for name, folder in data.items():
        federation.register(name)
        federation.start_node(name, node_config(config, name, folder, memory))


def node_config(config: Config, name: str, data: Path, memory: Path) -> dict[str, str]:
    about = {"name": name, "data-path": str(data), "memory": str(memory)}
    return {**about, **lenient_node(config, memory.parent)}


def rounds_of(run: Path, kind: str = "round") -> list[int]:
    return (
        [event["round"] for event in events_of(run, kind)]
        if (run / "events.jsonl").exists()
        else []
    )


@pytest.mark.slow
def test_real_tasks_on_four_machines_end_with_the_adapters_of_the_run_in_one_process(
    federation: Federation, tasks: list[str], shared_folder: Path, tmp_path: Path, one_thread: None
) -> None:
    base = shared_folder / "models" / "stories260K-hf"
    config = make_config(
        base,
        tmp_path / "all",
        {**SETTINGS, "rounds.count": 8, "graph.kind": "uniform", "federation.clients": tasks},
    )
    write_app(federation, config, tmp_path / "app")
    federation.start_superlink()
    start_nodes(
        federation, config, {name: tmp_path / "apart" / name for name in tasks}, tmp_path / "memory"
    )
    run = federation.start_run(tmp_path / "app")
    wait_until(lambda: run.poll() is not None, "the run", 900)
    assert (tmp_path / "run" / "report.html").is_file(), federation.log("run")
    assert (
        rounds_of(tmp_path / "run") == list(range(1, 9))
        and events_of(tmp_path / "run", "failure") == []
    )

    experiment = build_experiment(config)
    one_at_a_time = with_clients(experiment, local_of(experiment, 1))
    run_experiment(one_at_a_time, tmp_path / "together")
    apart, together = weights_of(tmp_path / "run"), weights_of(tmp_path / "together")
    assert len(apart) == TASKS and apart == together
    assert len(set(apart.values())) == TASKS, "every task has an adapter of its own"
    assert {
        row["client"] for row in table_of(tmp_path / "run", "clients") if row["after_align_loss"]
    } == set(tasks)


def weights_of(run: Path) -> dict[str, bytes]:
    return {
        name: content
        for name, content in adapter_bytes(run).items()
        if name.endswith("adapter_model.safetensors")
    }


MEDDLING = '''"""fedmira's node; in round 2 two clients answer, with NaN and with wrong shapes."""

from flwr.app import Message
from flwr.clientapp import ClientApp

from fedmira.flower_app import client_app as honest

client_app = ClientApp()


@client_app.query("identity")
@client_app.query("refusal")
@client_app.evaluate("losses")
def pass_on(message, context):
    return honest(message, context)


@client_app.train()
def meddle(message, context):
    reply, name = honest(message, context), context.node_config["name"]
    if message.metadata.group_id != "2" or name not in ("apple-2", "apple-3"):
        return reply
    import torch
    from dataclasses import replace
    from fedmira.federation.flower.records import bytes_of, record_of
    from fedmira.wire import Encoded, Line, decode, encode, pack, unpack

    encoded = unpack(bytes_of(reply.content))
    payload, _ = decode(encoded, Line())
    not_numbers = name == "apple-2"
    adapter = {
        key: tensor * torch.nan if not_numbers else tensor[:1]
        for key, tensor in payload.tensors["adapter"].items()
    }
    again = encode(replace(payload, tensors={"adapter": adapter}), "float32", Line())[0]
    changed = Encoded(again.arrays, {**encoded.header, **again.header})
    return Message(record_of(pack(changed)), reply_to=message)
'''


@pytest.mark.slow
def test_a_federation_survives_its_machines(
    federation: Federation, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    """One node is killed in the middle of a round and comes back two rounds later.

    Two answer nonsense; the server is killed and resumed;
    a node without a key and one without TLS are refused.
    """
    names = ["apple-1", "apple-2", "apple-3", "birch-1"]
    settings: dict[str, Any] = {
        "rounds.count": 7,
        "federation.clients": names,
        "federation.wait_s": 700,
        "federation.reply_s": 120,
    }
    config = make_config(
        base_folder, clients_folder, {**settings, "local.steps": 1, "algorithm.name": "local"}
    )
    run = tmp_path / "run"
    write_app(federation, config, tmp_path / "app")
    (tmp_path / "app" / "meddling.py").write_text(MEDDLING, encoding="utf-8")
    project = tmp_path / "app" / "pyproject.toml"
    project.write_text(
        project.read_text(encoding="utf-8").replace(
            "fedmira.flower_app:client_app", "meddling:client_app"
        ),
        encoding="utf-8",
    )
    federation.start_superlink()
    start_nodes(federation, config, dict.fromkeys(names, clients_folder), tmp_path / "memory")
    federation.start_node(
        "plain", node_config(config, "birch-2", clients_folder, tmp_path), "--insecure"
    )
    federation.start_node(
        "keyless",
        node_config(config, "birch-2", clients_folder, tmp_path),
        "--root-certificates",
        "ca.pem",
    )

    federation.start_run(tmp_path / "app")
    wait_until(lambda: 2 in rounds_of(run), "round 2", 900)
    assert "birch-1" in federation.log("run")
    federation.kill("birch-1")  # round 3 has begun
    wait_until(lambda: 4 in rounds_of(run), "round 4", 600)
    federation.start_node(
        "birch-1", node_config(config, "birch-1", clients_folder, tmp_path / "memory")
    )
    wait_until(lambda: 5 in rounds_of(run), "round 5", 600)
    federation.kill("superlink")
    federation.kill("run")
    done = rounds_of(run)
    federation.start_superlink()
    again = federation.start_run(tmp_path / "app", "resumed", "--run-config", "resume=true")
    wait_until(lambda: again.poll() is not None, "the resumed run", 900)

    assert (run / "report.html").is_file(), federation.log("resumed")
    assert len(done) >= 5 and rounds_of(run) == list(range(1, 8)), "every round stands there once"
    failures = {
        (failure["round"], failure["client"]): failure["reason"]
        for failure in events_of(run, "failure")
    }
    assert "finite" in failures[2, "apple-2"] and "expected float32" in failures[2, "apple-3"]
    assert (3, "birch-1") in failures and all(failures.values())
    trained = {
        event["round"]: event for event in events_of(run, "train") if event["client"] == "birch-1"
    }
    back = min(number for number in trained if number > 3)
    last = max(number for number in trained if number < back)
    assert trained[back]["loaded_hash"] == trained[last]["sent_hash"] and 7 in trained, (
        "it goes on from its own adapter"
    )
    assert "birch-2" not in {row["client"] for row in table_of(run, "clients")}
    assert "Activated" not in federation.log("plain") and "SuperNode ID" not in federation.log(
        "plain"
    ) + federation.log("keyless")
