"""FedKSeed: the server's adapter follows from the start and the numbers that travelled.

And from nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from fedmira.adapters import digest
from fedmira.adapters.directions import direction, moved_along, movement
from fedmira.errors import RunError
from fedmira.experiment import build_experiment, run_experiment
from fedmira.messages import Payload, Reply, Request
from fedmira.methods import FedKSeed, Trained
from fedmira.model import BaseModel
from small import cohort_of, events_of, make_config

SETTINGS: dict[str, Any] = {
    "algorithm.name": "fedkseed",
    "local.optimizer": "zeroth-order",
    "local.zeroth_seeds": 16,
    "local.steps": 5,
}


def start() -> dict[str, Tensor]:
    return direction(
        99, {"m.lora_A.weight": torch.empty(4, 6), "m.lora_B.weight": torch.empty(8, 4)}
    )


def reply(client: str, rows: int, coefficients: dict[int, float]) -> Reply:
    nonsense = {
        name: torch.full_like(tensor, 7.0) for name, tensor in start().items()
    }  # must not be looked at
    return Reply(
        client, 1, rows, Payload({"adapter": nonsense, "movement": movement(coefficients)})
    )


def test_coefficients_are_averaged_by_rows_and_added_up() -> None:
    """30 and 10 rows: weights 3/4 and 1/4. Seed 2 in round 1: 3/4 * 0.4 + 1/4 * 0.8 = 0.5.

    0.25 more in round 2.
    """
    algorithm = FedKSeed()
    state = algorithm.initial_state({"a": start(), "b": start()})
    state = algorithm.combine(
        state, [reply("b", 10, {2: 0.8}), reply("a", 30, {2: 0.4, 1: 1.0})]
    ).state
    assert torch.allclose(
        state.numbers["coefficients"], torch.tensor([0.75, 0.5])
    ) and state.numbers["seeds"].tolist() == [1, 2]
    state = algorithm.combine(state, [reply("b", 10, {2: 0.25})]).state
    assert torch.allclose(state.numbers["coefficients"], torch.tensor([0.75, 0.75]))
    for name, tensor in algorithm.adapter_for(state, "a").items():
        expected = start()[name] + 0.75 * (
            direction(1, start())[name] + direction(2, start())[name]
        )
        assert torch.allclose(tensor, expected, atol=1e-6)


def test_bytes_are_those_of_seeds_and_numbers() -> None:
    algorithm = FedKSeed()
    state = algorithm.initial_state({"a": start()})
    assert algorithm.instruct(state, "a").num_bytes == 0
    state = algorithm.combine(state, [reply("a", 5, {1: 0.5, 4: 0.5, 9: 0.5})]).state
    assert algorithm.instruct(state, "a").num_bytes == 3 * (4 + 4)
    payload, memory = algorithm.finish(
        algorithm.instruct(state, "a"),
        None,
        Trained(start(), 5, 2, 0.1, movement({1: 0.5, 2: 0.1})),
    )
    assert payload.num_bytes == 2 * (4 + 4) and memory is None


def test_a_client_and_the_server_make_the_same_adapter_from_what_travels(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    """Two rounds with a real cohort.

    Everything but what is counted as sent is thrown away on the way to the server.
    """
    experiment = build_experiment(make_config(base_folder, clients_folder, SETTINGS), base)
    algorithm, clients = experiment.algorithm, list(experiment.starts)
    common = next(iter(experiment.starts.values()))
    state = algorithm.initial_state(experiment.starts)
    for number in (1, 2):
        requests = [
            Request(client, number, 10 * number + k, algorithm.instruct(state, client))
            for k, client in enumerate(clients)
        ]
        for request in requests:
            replayed = moved_along(common, state.numbers)
            assert digest(replayed) == digest(request.payload.tensors["adapter"]), (
                "what a client makes of the coefficients, to the bit"
            )
        answers = [answer for answer, _ in cohort_of(experiment, algorithm).work(requests, {})]
        assert all(isinstance(answer, Reply) for answer in answers)
        stripped = [
            Reply(
                a.client_id,
                a.round,
                a.num_examples,
                Payload({"movement": a.payload.tensors["movement"]}),
            )
            for a in answers
            if isinstance(a, Reply)
        ]
        whole = algorithm.combine(
            state, [answer for answer in answers if isinstance(answer, Reply)]
        ).state
        state = algorithm.combine(state, stripped).state
        assert (
            digest(whole.adapters["shared"]) == digest(state.adapters["shared"]) != digest(common)
        )


def test_a_run_sends_a_handful_of_numbers_and_its_clients_load_what_the_server_made(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    experiment = build_experiment(make_config(base_folder, clients_folder, SETTINGS), base)
    run_experiment(experiment, tmp_path / "run")
    events = events_of(tmp_path / "run", "train")
    assert all(0 < event["bytes_up"] <= 5 * 8 for event in events), "at most one number a step"
    assert {event["bytes_down"] for event in events if event["round"] == 1} == {0}
    assert all(0 < event["bytes_down"] <= 16 * 8 for event in events if event["round"] > 1), (
        "at most one number a candidate"
    )
    saved = {event["round"]: event["saved_hash"] for event in events_of(tmp_path / "run", "align")}
    assert all(
        event["loaded_hash"] == saved[event["round"] - 1] for event in events if event["round"] > 1
    )


@pytest.mark.parametrize("wrong", [{"local.optimizer": "adamw"}, {"local.weight_decay": 0.1}])
def test_other_local_training_is_refused_before_it_begins(
    base_folder: Path, clients_folder: Path, wrong: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match=r"zeroth-order.*weight_decay = 0"):
        make_config(base_folder, clients_folder, {**SETTINGS, **wrong})


def test_training_without_numbers_is_an_error() -> None:
    algorithm = FedKSeed()
    state = algorithm.initial_state({"a": start()})
    with pytest.raises(RunError, match="zeroth-order"):
        algorithm.finish(algorithm.instruct(state, "a"), None, Trained(start(), 5, 2, 0.1))
