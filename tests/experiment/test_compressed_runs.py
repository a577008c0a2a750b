"""Runs whose messages are compressed.

What that costs in quality, what it saves in bytes, and that they resume to the same bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedmira.adapters import Adapter, distance
from fedmira.experiment import (
    Experiment,
    build_experiment,
    resume_experiment,
    run_experiment,
)
from fedmira.messages import Payload, Reply, Request
from fedmira.model import BaseModel
from fedmira.observers import Observer, RoundEvent
from fedmira.rounds import run_rounds
from small import (
    CLIENTS,
    adapter_bytes,
    events_of,
    make_config,
    table_of,
)

SETTINGS: dict[str, Any] = {
    "rounds.count": 4,
    "graph.kind": "category",
    "adapter.ranks": {"birch-1": 2},
}
SIDES = (32 + 32) + (32 + 16)
"""q_proj 32 to 32 and v_proj 32 to 16 of the tiny Llama."""
LAYERS = 2


def whole(rank: int) -> int:
    """Bytes of a client's adapter in float32."""
    return 4 * LAYERS * rank * SIDES


def compressed(rank: int, wire: str) -> int:
    """Bytes of a change: 2 a parameter, or 1 and scales.

    A float32 scale for each row of A and column of B in 2 modules a layer.
    """
    return LAYERS * rank * (2 * SIDES if wire == "float16" else SIDES + 4 * 2 * 2)


MOST = {"float16": 1e-3, "int8": 2e-2}
"""Largest distance from the exact run, as a share of what training changed.

The widths of the formats, 2^-11 and 1 / 254, over rounds.
"""


@pytest.mark.parametrize(
    "settings", [{}, {"algorithm.name": "fedavg", "adapter.ranks": {}}], ids=["mira", "fedavg"]
)
def test_compressed_runs_end_near_those_that_send_all(
    settings: dict[str, Any], base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    """With plain steps.

    Adam turns the smallest differences of tiny gradients into whole steps, whatever made them.
    """
    plain = {**SETTINGS, "local.optimizer": "sgd", "local.learning_rate": 0.5, **settings}
    ends = {
        wire: end_of(base, base_folder, clients_folder, {**plain, "engine.wire": wire})
        for wire in ("float32", *MOST)
    }
    (experiment, exact), starts = ends["float32"], ends["float32"][0].starts
    assert improvement(experiment, exact) > 1, "the run must learn, or nothing is shown"
    for wire, most in MOST.items():
        found = ends[wire][1]
        shares = [
            distance(found[client], adapter) / distance(adapter, starts[client])
            for client, adapter in exact.items()
        ]
        assert 0 < max(shares) < most


def test_compressed_runs_learn_as_much_with_adam(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    settings = {**SETTINGS, "local.steps": 6, "rounds.count": 3}
    experiment, exact = end_of(base, base_folder, clients_folder, settings)
    _, found = end_of(base, base_folder, clients_folder, {**settings, "engine.wire": "int8"})
    assert improvement(experiment, found) == pytest.approx(improvement(experiment, exact), rel=0.05)


def built(
    base: BaseModel, base_folder: Path, clients_folder: Path, settings: Mapping[str, Any]
) -> Experiment:
    """The experiment behind the wire that its settings ask for."""
    return build_experiment(make_config(base_folder, clients_folder, settings), base)


def end_of(
    base: BaseModel, base_folder: Path, clients_folder: Path, settings: Mapping[str, Any]
) -> tuple[Experiment, dict[str, Adapter]]:
    """The experiment and each client's adapter after the last round."""
    experiment = built(base, base_folder, clients_folder, settings)
    algorithm, config = experiment.algorithm, experiment.config
    start = algorithm.initial_state(experiment.starts)
    last = run_rounds(
        algorithm,
        experiment.clients,
        start,
        list(experiment.ranks),
        config.rounds,
        config.seed,
        lambda outcome: None,
    )
    return experiment, {client: algorithm.adapter_for(last, client) for client in CLIENTS}


def improvement(experiment: Experiment, adapters: Mapping[str, Adapter]) -> float:
    """By how much the mean test loss fell, in nats per token."""
    before, after = (
        experiment.clients.losses(each, "test").values() for each in (experiment.starts, adapters)
    )
    return statistics.fmean(loss.per_token for loss in before) - statistics.fmean(
        loss.per_token for loss in after
    )


def test_what_the_server_gets_is_what_its_clients_trained_but_for_rounding(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    """In round 1 nobody holds a reference, so clients train from the same start.

    Replies are off by half a scale at most.
    """
    replies: dict[str, dict[str, Reply]] = {}
    for wire in ("float32", "int8"):
        experiment = built(base, base_folder, clients_folder, {**SETTINGS, "engine.wire": wire})
        state = experiment.algorithm.initial_state(experiment.starts)
        requests = [
            Request(client, 1, 7, experiment.algorithm.instruct(state, client))
            for client in experiment.ranks
        ]
        answers = experiment.clients.train(requests)
        replies[wire] = {
            answer.client_id: answer for answer in answers if isinstance(answer, Reply)
        }
    assert set(replies["int8"]) == set(CLIENTS)
    for client, reply in replies["int8"].items():
        exact, start = (
            replies["float32"][client].payload.tensors["adapter"],
            experiment.starts[client],
        )
        for name, tensor in reply.payload.tensors["adapter"].items():
            axis = 0 if "lora_B" in name else 1
            half = (exact[name].double() - start[name]).abs().amax(dim=axis, keepdim=True) / 127 / 2
            assert bool(((tensor.double() - exact[name]).abs() <= half * (1 + 1e-4) + 1e-7).all())
        assert reply.metrics == replies["float32"][client].metrics
        assert replies["float32"][client].traffic is None


@pytest.mark.parametrize("wire", ["float16", "int8"])
def test_bytes_are_those_of_the_messages(
    wire: str, base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "engine.wire": wire, "rounds.count": 3}
    run_experiment(built(base, base_folder, clients_folder, settings), tmp_path / "run")
    ranks = {client: 2 if client == "birch-1" else 4 for client in CLIENTS}
    trains = events_of(tmp_path / "run", "train")
    assert len(trains) == 3 * len(CLIENTS)
    for event in trains:
        rank = ranks[event["client"]]
        change = compressed(rank, wire)
        assert (event["bytes_down"], event["bytes_up"]) == (
            whole(rank) if event["round"] == 1 else change,
            change,
        )
        kinds = "float16" if wire == "float16" else "float32+int8"
        assert (event["dtype_down"], event["dtype_up"]) == (
            "float32" if event["round"] == 1 else kinds,
            kinds,
        )
    for row in table_of(tmp_path / "run", "rounds"):
        of_round = [event for event in trains if event["round"] == int(row["round"])]
        assert int(row["bytes_down"]) == sum(event["bytes_down"] for event in of_round)
        assert int(row["bytes_up"]) == sum(event["bytes_up"] for event in of_round)


class PowerCut(BaseException):
    """Raised in the middle of a run."""


class Cut(Observer):
    """Ends the run after its second round."""

    def on_round(self, event: RoundEvent) -> None:
        if event.round == 2:
            raise PowerCut


@pytest.mark.parametrize(
    "settings",
    [
        {"rounds.participation": 0.6, "graph.kind": "similarity", "adapter.ranks": {}},
        {
            "algorithm.space": "factor",
            "adapter.ranks": {},
            "local.optimizer_state": "kept",
            "rounds.participation": 0.6,
        },
    ],
    ids=["learned graph", "kept moments beside the lines"],
)
def test_a_compressed_run_that_is_cut_off_ends_in_the_same_bytes(
    settings: Mapping[str, Any],
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
) -> None:
    folders, keys = (
        (base_folder, clients_folder),
        {**SETTINGS, "engine.wire": "int8", "rounds.count": 3, **settings},
    )
    run_experiment(built(base, *folders, keys), tmp_path / "straight")

    with pytest.raises(PowerCut):
        run_experiment(built(base, *folders, keys), tmp_path / "run", [Cut()])
    resume_experiment(built(base, *folders, keys), tmp_path / "run")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "straight")
    assert events_of(tmp_path / "run", timing=False) == events_of(
        tmp_path / "straight", timing=False
    )


def test_a_client_that_fails_leaves_its_line_as_it_was(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    experiment = built(base, base_folder, clients_folder, {**SETTINGS, "engine.wire": "int8"})
    state, engine = experiment.algorithm.initial_state(experiment.starts), experiment.clients
    first = Request("apple-1", 1, 7, experiment.algorithm.instruct(state, "apple-1"))
    (reply,) = engine.train([first])
    assert isinstance(reply, Reply)
    before = engine.memories["apple-1"]
    huge = {name: tensor * 0 + 1e30 for name, tensor in first.payload.tensors["adapter"].items()}
    (failure,) = engine.train([replace(first, round=2, payload=Payload({"adapter": huge}))])
    assert not isinstance(failure, Reply) and failure.stage == "train"
    assert (
        failure.traffic is not None
        and failure.traffic.down.num_bytes > 0 == failure.traffic.up.num_bytes
    )
    assert engine.memories["apple-1"] is before
    (again,) = engine.train([replace(first, round=3, payload=reply.payload)])
    assert isinstance(again, Reply)


def test_a_method_that_sends_a_part_of_its_adapters_is_refused_before_training(
    base_folder: Path, clients_folder: Path
) -> None:
    with pytest.raises(
        ValueError,
        match=r"engine.wire = 'int8' compresses .+ 'ditto' sends a part of them; set engine.wire "
        r"= 'float32'",
    ):
        make_config(base_folder, clients_folder, {"algorithm.name": "ditto", "engine.wire": "int8"})
    make_config(base_folder, clients_folder, {"algorithm.name": "ditto"})
