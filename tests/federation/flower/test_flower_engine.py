"""A federation through Flower's own messages.

The same run as in one process, and what becomes of nodes that fail or do not fit.
"""

from __future__ import annotations

import pytest

pytest.importorskip("flwr", reason="Flower is not installed; pip install 'fedmira[flower]'")

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Error, Message, RecordDict

from fedmira.config import Config
from fedmira.errors import ConfigError, RoundError
from fedmira.experiment import build_experiment, run_experiment
from fedmira.federation.codes import code_text
from fedmira.federation.flower.records import bytes_of, record_of
from fedmira.federation.server import run_federation
from fedmira.runs import Result
from fedmira.wire import (
    Encoded,
    Line,
    decode,
    encode,
    pack,
    unpack,
)
from loopback import LoopbackGrid, Meddler
from small import (
    CLIENTS,
    adapter_bytes,
    events_of,
    make_config,
    over_wire,
    table_of,
    with_clients,
    write_clients,
)

LOST_CODES = (3, 4, 5, 8)
"""Flower's: message, reply or node unavailable, and a node's program that stopped responding."""


def nodes_of(data: Path, memory: Path, names: Any = CLIENTS) -> dict[int, Mapping[str, Any]]:
    return {
        100 + i: {"name": name, "data-path": str(data), "memory": str(memory)}
        for i, name in enumerate(names)
    }


def run_apart(config: Config, grid: LoopbackGrid, output: Path, resume: bool = False) -> Result:
    return run_federation(config, grid, output, resume=resume)


def settings_of(**more: Any) -> dict[str, Any]:
    return {
        "federation.nodes": len(CLIENTS),
        "federation.wait_s": 0.5,
        "federation.reply_s": 0.3,
        **more,
    }


def changed(message: Message, reply: Message, change: Any) -> Message:
    """A reply whose adapter is another one, as its node would have written it."""
    encoded = unpack(bytes_of(reply.content))
    payload, _ = decode(encoded, Line())
    again = encode(
        replace(payload, tensors={"adapter": change(payload.tensors["adapter"])}), "float32", Line()
    )[0]
    content = record_of(pack(Encoded(again.arrays, {**encoded.header, **again.header})))
    return Message(content, reply_to=message)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"algorithm.name": "ditto"},
        {"algorithm.name": "feddpa"},
        {"algorithm.name": "fola"},
        {"algorithm.name": "mtlora"},
        {"algorithm.name": "cgc-lora", "algorithm.common_experts": 2},
        {"algorithm.name": "gossip", "graph.kind": "uniform"},
        {"algorithm.name": "rolora"},
        {
            "algorithm.name": "fedalt",
            "algorithm.rest_space": "factor",
            "algorithm.learned_share": True,
            "graph.kind": "uniform",
        },
        {"algorithm.safeguard": True},
        {"algorithm.space": "factor", "local.optimizer_state": "kept", "engine.wire": "int8"},
    ],
    ids=[
        "mira",
        "ditto",
        "feddpa",
        "fola",
        "mtlora",
        "cgc-lora",
        "gossip",
        "rolora",
        "fedalt",
        "safeguard",
        "kept moments in int8",
    ],
)
def test_a_federation_ends_with_the_adapters_of_the_run_in_one_process(
    settings: dict[str, Any], base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(
        base_folder, clients_folder, settings_of(**settings, **{"rounds.participation": 0.6})
    )
    grid = LoopbackGrid(config, nodes_of(clients_folder, tmp_path / "memory"))
    run_apart(config, grid, tmp_path / "apart")
    experiment = build_experiment(config)
    one_at_a_time = with_clients(experiment, over_wire(experiment, 1))
    run_experiment(one_at_a_time, tmp_path / "together")
    files = [
        {
            name: content
            for name, content in adapter_bytes(tmp_path / run).items()
            if name.endswith(".safetensors")
        }
        for run in ("apart", "together")
    ]
    assert len(files[0]) == len(CLIENTS) and files[0] == files[1]
    losses = [
        [row["after_align_loss"] for row in table_of(tmp_path / run, "clients")]
        for run in ("apart", "together")
    ]
    assert [float(loss) for loss in losses[0]] == pytest.approx(
        [float(loss) for loss in losses[1]], rel=1e-4
    )
    assert (tmp_path / "apart" / "report.html").is_file()


def test_nodes_weigh_their_own_rows_by_advantage(base_folder: Path, tmp_path: Path) -> None:
    data = write_clients(tmp_path / "rows")
    for file in data.glob("*/train.jsonl"):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        told = [{**row, "advantage": number % 3 - 1} for number, row in enumerate(rows)]
        file.write_text("".join(json.dumps(row) + "\n" for row in told), encoding="utf-8")
    adapters = {}
    for temperature in (0.5, 0.0):
        settings = settings_of(**{"local.advantage_temperature": temperature})
        config = make_config(base_folder, data, settings)
        output = tmp_path / f"apart-{temperature}"
        memory = tmp_path / f"memory-{temperature}"
        run_apart(config, LoopbackGrid(config, nodes_of(data, memory)), output)
        experiment = build_experiment(config)
        together = tmp_path / f"together-{temperature}"
        run_experiment(with_clients(experiment, over_wire(experiment, 1)), together)
        adapters[temperature] = [
            {
                name: content
                for name, content in adapter_bytes(run).items()
                if name.endswith(".safetensors")
            }
            for run in (output, together)
        ]
    assert adapters[0.5][0] == adapters[0.5][1]
    assert adapters[0.5][0] != adapters[0.0][0]


def test_nodes_lean_on_their_own_rows_as_clients_of_one_process_do(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = settings_of(**{"evaluation.reference_share": 0.4, "algorithm.name": "local"})
    config = make_config(base_folder, clients_folder, settings)
    grid = LoopbackGrid(config, nodes_of(clients_folder, tmp_path / "memory"))
    run_apart(config, grid, tmp_path / "apart")
    run_experiment(build_experiment(config), tmp_path / "together")
    losses = [
        [float(row["after_align_loss"]) for row in table_of(tmp_path / run, "clients")]
        for run in ("apart", "together")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_each_node_receives_its_own_adapter_only(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    seen: dict[str, set[str]] = {}

    def note(client: str, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train":
            header = unpack(bytes_of(message.content)).header
            seen.setdefault(client, set()).add(str(header["client"]))
        return reply

    config = make_config(base_folder, clients_folder, settings_of())
    run_apart(
        config, LoopbackGrid(config, nodes_of(clients_folder, tmp_path), note), tmp_path / "run"
    )
    assert seen == {client: {client} for client in CLIENTS}


def not_a_number(client: str, message: Message, reply: Message) -> Message:
    return changed(
        message,
        reply,
        lambda adapter: {
            name: torch.full_like(tensor, torch.nan) for name, tensor in adapter.items()
        },
    )


def cut_short(client: str, message: Message, reply: Message) -> Message:
    return changed(
        message, reply, lambda adapter: {name: tensor[:1] for name, tensor in adapter.items()}
    )


def lost(client: str, message: Message, reply: Message) -> None:
    return None


def foreign(client: str, message: Message, reply: Message) -> Message:
    return Message(RecordDict(), reply_to=message)


def garbage(client: str, message: Message, reply: Message) -> Message:
    return Message(record_of(b"nonsense"), reply_to=message)


def other_round(client: str, message: Message, reply: Message) -> Message:
    encoded = unpack(bytes_of(reply.content))
    return Message(
        record_of(pack(Encoded(encoded.arrays, {**encoded.header, "round": 7}))), reply_to=message
    )


@pytest.mark.parametrize(
    ("meddler", "stage", "reason"),
    [
        (not_a_number, "reply", "finite"),
        (cut_short, "reply", "expected float32"),
        (lost, "reply", "no reply within 0.3 s"),
        (foreign, "reply", "no message of fedmira's"),
        (garbage, "reply", "they are no message"),
        (other_round, "reply", "of round 7; expected round 2"),
    ],
    ids=["NaN", "shapes", "lost", "foreign", "garbage", "other round"],
)
def test_a_bad_reply_is_a_failure_with_its_reason_and_the_client_goes_on_from_its_own_adapter(
    meddler: Meddler,
    stage: str,
    reason: str,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
) -> None:
    rounds: list[int] = []

    def in_round_two(client: str, message: Message, reply: Message) -> Message | None:
        if message.metadata.message_type != "train" or client != "apple-2":
            return reply
        rounds.append(int(unpack(bytes_of(message.content)).header["round"]))
        return meddler(client, message, reply) if rounds[-1] == 2 else reply

    config = make_config(base_folder, clients_folder, settings_of(**{"algorithm.name": "local"}))
    run_apart(
        config,
        LoopbackGrid(config, nodes_of(clients_folder, tmp_path), in_round_two),
        tmp_path / "run",
    )
    failures = events_of(tmp_path / "run", "failure")
    assert [(failure["round"], failure["client"], failure["stage"]) for failure in failures] == [
        (2, "apple-2", stage)
    ]
    assert reason in failures[0]["reason"]
    trained = {
        event["round"]: event
        for event in events_of(tmp_path / "run", "train")
        if event["client"] == "apple-2"
    }
    assert sorted(trained) == [1, 3] and trained[3]["loaded_hash"] == trained[1]["sent_hash"]


def test_a_node_that_fails_sends_a_code_and_keeps_the_words_in_its_log(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    grid: LoopbackGrid

    def break_memory(client: str, message: Message, reply: Message) -> Message:
        for path in (tmp_path / "memory").rglob("apple-3/*.safetensors"):
            path.write_bytes(b"damaged")
        return reply

    config = make_config(base_folder, clients_folder, settings_of())
    grid = LoopbackGrid(config, nodes_of(clients_folder, tmp_path / "memory"), break_memory)
    run_apart(config, grid, tmp_path / "run")
    assert {(f["client"], f["stage"]) for f in events_of(tmp_path / "run", "failure")} == {
        ("apple-3", "memory")
    }
    assert {failure["reason"] for failure in events_of(tmp_path / "run", "failure")} == {
        code_text("memory")
    }
    log = (tmp_path / "memory" / "apple-3.log").read_text(encoding="utf-8")
    assert "private memory cannot be read" in log


def test_a_node_that_is_away_is_left_out_and_taken_up_again_under_another_id(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(
        base_folder,
        clients_folder,
        settings_of(**{"rounds.count": 4, "evaluation.every": 1, "federation.wait_s": 5}),
    )

    def come_and_go(client: str, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train":
            number = int(unpack(bytes_of(message.content)).header["round"])
            if (client, number) == ("birch-2", 1):
                del grid.nodes[104]
            if (client, number) == ("apple-1", 3):
                grid.nodes[204] = nodes_of(clients_folder, tmp_path)[104]
        return reply

    grid = LoopbackGrid(config, nodes_of(clients_folder, tmp_path), come_and_go)
    run_apart(config, grid, tmp_path / "run")
    away = {
        (f["round"], f["stage"])
        for f in events_of(tmp_path / "run", "failure")
        if f["client"] == "birch-2"
    }
    assert (
        (2, "send") in away
        and (3, "send") in away
        and (4, "send") not in away
        and (1, "evaluate") in away
    )
    assert {
        event["round"]
        for event in events_of(tmp_path / "run", "train")
        if event["client"] == "birch-2"
    } == {1, 4}


def test_a_node_whose_first_word_is_lost_is_asked_again(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(base_folder, clients_folder, settings_of(**{"federation.wait_s": 5}))
    lost = {client: LOST_CODES[i % len(LOST_CODES)] for i, client in enumerate(CLIENTS)}

    def lose_once(client: str, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "query.identity" and client in lost:
            return Message(Error(lost.pop(client), "lost on the way"), reply_to=message)
        return reply

    run_apart(
        config,
        LoopbackGrid(config, nodes_of(clients_folder, tmp_path / "memory"), lose_once),
        tmp_path / "run",
    )
    assert not lost and {event["client"] for event in events_of(tmp_path / "run", "train")} == set(
        CLIENTS
    )


def test_a_node_that_never_says_who_it_is_stands_in_the_error(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(base_folder, clients_folder, settings_of())

    def lose(client: str, message: Message, reply: Message) -> Message:
        return (
            Message(Error(LOST_CODES[0], "lost on the way"), reply_to=message)
            if client == "birch-2"
            else reply
        )

    grid = LoopbackGrid(
        config, nodes_of(clients_folder, tmp_path / "memory"), lose, registered={104: "birch-2"}
    )
    with pytest.raises(
        ConfigError,
        match=r"4 of 5 nodes came.*node birch-2 did not say who it is \(lost on the way\); it is "
        r"asked again",
    ):
        run_apart(config, grid, tmp_path / "run")


def test_a_message_that_expired_is_a_late_reply(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(base_folder, clients_folder, settings_of())

    def expire(client: str, message: Message, reply: Message) -> Message:
        expired = message.metadata.message_type == "train" and client == "birch-2"
        return (
            Message(Error(LOST_CODES[0], "Message Unavailable"), reply_to=message)
            if expired
            else reply
        )

    run_apart(
        config,
        LoopbackGrid(config, nodes_of(clients_folder, tmp_path / "memory"), expire),
        tmp_path / "run",
    )
    failures = events_of(tmp_path / "run", "failure")
    assert {(failure["client"], failure["stage"]) for failure in failures} == {("birch-2", "reply")}
    assert {failure["reason"] for failure in failures} == {
        "no reply within 0.3 s (federation.reply_s)"
    }


def test_too_few_replies_end_the_run_and_it_resumes_when_the_nodes_are_back(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(base_folder, clients_folder, settings_of(**{"rounds.min_replies": 4}))
    broken = True

    def two_fail(client: str, message: Message, reply: Message) -> Message | None:
        lost = broken and message.metadata.message_type == "train" and client.startswith("birch")
        return (
            None if lost and int(unpack(bytes_of(message.content)).header["round"]) == 2 else reply
        )

    grid = LoopbackGrid(config, nodes_of(clients_folder, tmp_path / "memory"), two_fail)
    with pytest.raises(
        RoundError, match="round 2: 3 of 5 clients sent a usable reply.*rounds.min_replies is 4"
    ):
        run_apart(config, grid, tmp_path / "run")
    assert {failure["client"] for failure in events_of(tmp_path / "run", "failure")} == {
        "birch-1",
        "birch-2",
    }
    broken = False
    run_apart(config, grid, tmp_path / "run", resume=True)
    whole = LoopbackGrid(config, nodes_of(clients_folder, tmp_path / "other memory"))
    run_apart(config, whole, tmp_path / "whole")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "settings", "registered", "reason"),
    [
        ({"name": "apple-1"}, {}, {}, "a node called 'apple-1' is connected already"),
        (
            {"name": "stranger"},
            {"federation.clients": list(CLIENTS)},
            {},
            "code data (1 problem)",
        ),
        (
            {"name": "birch-2"},
            {"federation.clients": list(CLIENTS)[:-1] + ["cedar"]},
            {},
            "'birch-2' is not in federation.clients",
        ),
        ({"base": "OTHER"}, {}, {}, "another base model"),
        ({"base": "TOKENS"}, {}, {}, "another tokenizer"),
        ({"data-path": "/nowhere"}, {}, {}, "code data (1 problem)"),
        ({"nmae": "x"}, {}, {}, "code config (1 problem)"),
        ({}, {}, {104: "cedar"}, "registered as 'cedar' but calls itself 'birch-2'"),
    ],
)
def test_a_node_that_does_not_fit_is_refused_on_both_sides(
    change: dict[str, str],
    settings: dict[str, Any],
    registered: dict[int, str],
    reason: str,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = {"OTHER": other_base, "TOKENS": other_tokens}
    if change.get("base") in other:
        change = {"base": str(other[change["base"]](base_folder, tmp_path / "other"))}
    config = make_config(base_folder, clients_folder, settings_of(**settings))
    nodes = nodes_of(clients_folder, tmp_path)
    grid = LoopbackGrid(config, {**nodes, 104: {**nodes[104], **change}}, registered=registered)
    with pytest.raises(ConfigError, match="4 of 5 nodes came") as caught:
        run_apart(config, grid, tmp_path / "run")
    assert reason in str(caught.value) and not (tmp_path / "run").exists()
    server, node = "refused a node: ", "the server refused this node: "
    said = [record.getMessage() for record in caplog.records]
    words = {"/nowhere": "'/nowhere' does not exist", "stranger": "none is called 'stranger'"}
    told = [words.get(value, "is unknown") for value in change.values()]
    of_node = told[0] if "code " in reason else reason
    assert any(text.startswith((node, "query.identity: ")) and of_node in text for text in said)
    assert any(
        text.startswith((server, "a node cannot take part: ")) and reason in text for text in said
    )


def other_base(base: Path, folder: Path) -> Path:
    from tiny import tiny_model, tiny_tokenizer

    tiny_model("llama", seed=5).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def other_tokens(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"w5"', '"x5"'), encoding="utf-8")
    return folder


def test_a_resumed_server_goes_on_with_nodes_that_ran_ahead(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    """The server is gone after round 2 was trained but before it was written down.

    The nodes' memories are a round ahead.
    """
    config = make_config(
        base_folder,
        clients_folder,
        settings_of(
            **{"algorithm.space": "factor", "local.optimizer_state": "kept", "engine.wire": "int8"}
        ),
    )
    crash = True

    def die(client: str, message: Message, reply: Message) -> Message:
        if crash and message.metadata.message_type == "train" and client == "birch-2":
            if int(unpack(bytes_of(message.content)).header["round"]) == 2:
                raise KeyboardInterrupt
        return reply

    grid = LoopbackGrid(config, nodes_of(clients_folder, tmp_path / "memory"), die)
    with pytest.raises(KeyboardInterrupt):
        run_apart(config, grid, tmp_path / "run")
    crash = False
    run_apart(
        config,
        LoopbackGrid(config, nodes_of(clients_folder, tmp_path / "memory")),
        tmp_path / "run",
        resume=True,
    )
    run_apart(
        config,
        LoopbackGrid(config, nodes_of(clients_folder, tmp_path / "other memory")),
        tmp_path / "whole",
    )
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert [event["round"] for event in events_of(tmp_path / "run", "round")] == [1, 2, 3]


def killed_in_round_two(
    config: Config, nodes: Mapping[int, Mapping[str, Any]], output: Path
) -> None:
    """The server is gone in the middle of round 2."""

    def die(client: str, message: Message, reply: Message) -> Message:
        if (
            message.metadata.message_type == "train"
            and int(unpack(bytes_of(message.content)).header["round"]) == 2
        ):
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        run_apart(config, LoopbackGrid(config, nodes, die), output)


def test_a_run_that_lost_a_party_is_resumed_with_enough_of_the_others(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(base_folder, clients_folder, settings_of(**{"rounds.min_replies": 4}))
    nodes = nodes_of(clients_folder, tmp_path / "memory")
    killed_in_round_two(config, nodes, tmp_path / "run")
    three, four = (
        {node: of for node, of in nodes.items() if node - 100 < count} for count in (3, 4)
    )
    with pytest.raises(
        ConfigError,
        match="3 of 5 nodes came within 0.5 s.*missing: birch-1, birch-2; start the others, then "
        "resume again",
    ):
        run_apart(config, LoopbackGrid(config, three), tmp_path / "run", resume=True)
    run_apart(config, LoopbackGrid(config, four), tmp_path / "run", resume=True)
    trained = {event["round"]: set() for event in events_of(tmp_path / "run", "round")}
    for event in events_of(tmp_path / "run", "train"):
        trained[event["round"]].add(event["client"])
    assert trained == {
        1: set(CLIENTS),
        2: set(CLIENTS) - {"birch-2"},
        3: set(CLIENTS) - {"birch-2"},
    }
    assert len(table_of(tmp_path / "run", "clients")) == len(CLIENTS), (
        "the absent client keeps what it had"
    )


@pytest.mark.parametrize("wiped", [False, True], ids=["run folder moved", "memory gone"])
def test_memory_is_found_after_the_run_folder_was_moved_and_its_loss_is_told(
    wiped: bool, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(
        base_folder,
        clients_folder,
        settings_of(**{"algorithm.space": "factor", "local.optimizer_state": "kept"}),
    )
    nodes = nodes_of(clients_folder, tmp_path / "memory")
    killed_in_round_two(config, nodes, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    if wiped:
        shutil.rmtree(tmp_path / "memory")
    run_apart(config, LoopbackGrid(config, nodes), tmp_path / "moved", resume=True)
    told = {
        (event["round"], event["client"])
        for event in events_of(tmp_path / "moved", "train")
        if "memory_lost" in event
    }
    assert told == ({(2, client) for client in CLIENTS} if wiped else set())
