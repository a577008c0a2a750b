"""What all clients keep, whatever the order.

An answer per request, private memories, and no hidden state.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmira.adapters import Adapter, digest
from fedmira.clients import Clients, OverWire
from fedmira.experiment import Experiment, build_experiment
from fedmira.messages import Failure, Reply, Request
from fedmira.methods import ServerState
from fedmira.model import BaseModel, tokenizer_hash
from fedmira.seeds import seed_for
from small import local_of, make_config

TOLERANCE = 1e-4
"""float32, side by side or in turn.

Largest distance of two trained adapters of a client, as a share of what training changed.

Measured with plain gradient descent: Adam divides by sqrt(v), so an entry whose gradient is near
the rounding of float32 moves by a good part of the learning rate in a direction that rounding
chose. Another batch gives a share of 0.5 and more.
"""

STEADY = {"local__optimizer": "sgd", "local__learning_rate": 1.0}


def in_process(experiment: Experiment, cohort_size: int, folder: Path) -> Clients:
    return local_of(experiment, cohort_size)


def over_a_wire(experiment: Experiment, cohort_size: int, folder: Path) -> Clients:
    """Whole adapters through messages, so that nothing is rounded."""
    return OverWire(local_of(experiment, cohort_size), "float32", cohort_size)


def over_flower(experiment: Experiment, cohort_size: int, folder: Path) -> Clients:
    pytest.importorskip("flwr", reason="Flower is not installed; pip install 'fedmira[flower]'")
    from fedmira.federation.ends import ServerEnd
    from fedmira.federation.flower.clients import FlowerClients
    from fedmira.federation.flower.nodes import Nodes
    from loopback import LoopbackGrid

    grid = LoopbackGrid(
        experiment.config,
        {
            number: {"name": name, "memory": str(folder)}
            for number, name in enumerate(experiment.ranks)
        },
    )
    base = experiment.kind.base
    nodes = Nodes(
        grid, base.sha256, tokenizer_hash(base.tokenizer), tuple(experiment.ranks), reply_s=60
    )
    return FlowerClients(
        nodes,
        experiment.parties,
        ServerEnd("float32", folder.name),
        min_replies=len(experiment.ranks),
        wait_s=60,
    )


ALL: dict[str, Callable[[Experiment, int, Path], Clients]] = {
    "in-process": in_process,
    "over a wire": over_a_wire,
    "flower": over_flower,
}
"""Name -> makes the clients of an experiment.

With at most so many clients at once, and a folder of its own.
"""


@pytest.fixture(params=ALL)
def make_clients(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Experiment, int], Clients]:
    return lambda experiment, cohort_size: ALL[request.param](
        experiment, cohort_size, tmp_path_factory.mktemp("clients")
    )


remembers = pytest.mark.parametrize("make_clients", ["in-process"], indirect=True)
"""For tests of what clients remember, where the engine keeps it.

Other engines leave it on the clients' machines (test_node_memory.py).
"""


@pytest.fixture
def experiment(base: BaseModel, base_folder: Path, clients_folder: Path) -> Experiment:
    return built(base, base_folder, clients_folder)


def built(base: BaseModel, base_folder: Path, clients_folder: Path, **settings: Any) -> Experiment:
    keys = {name.replace("__", "."): value for name, value in settings.items()}
    return build_experiment(
        make_config(
            base_folder, clients_folder, {"algorithm.name": "local", "local.steps": 3, **keys}
        ),
        base,
    )


def requests_of(
    experiment: Experiment, round_number: int = 1, state: ServerState | None = None
) -> list[Request]:
    algorithm = experiment.algorithm
    state = state or algorithm.initial_state(experiment.starts)
    return [
        Request(
            client,
            round_number,
            seed_for(0, "train", round_number, client),
            algorithm.instruct(state, client),
        )
        for client in experiment.ranks
    ]


def replies_of(answers: list[Reply | Failure]) -> dict[str, Adapter]:
    assert all(isinstance(answer, Reply) for answer in answers), answers
    return {
        answer.client_id: answer.payload.tensors["adapter"]
        for answer in answers
        if isinstance(answer, Reply)
    }


def distance(left: Adapter, right: Adapter) -> float:
    assert set(left) == set(right)
    return float(
        sum(
            (tensor.double() - right[name].double()).square().sum() for name, tensor in left.items()
        )
        ** 0.5
    )


def largest_share(
    left: dict[str, Adapter], right: dict[str, Adapter], requests: list[Request]
) -> float:
    """The largest distance of two adapters of one client.

    As a share of how far the first is from where it started.
    """
    assert set(left) == set(right) == {request.client_id for request in requests}
    starts = {request.client_id: request.payload.tensors["adapter"] for request in requests}
    return max(
        distance(adapter, right[client]) / distance(adapter, starts[client])
        for client, adapter in left.items()
    )


def hashes(adapters: dict[str, Adapter]) -> dict[str, str]:
    return {client: digest(adapter) for client, adapter in adapters.items()}


def test_there_is_one_answer_per_request_with_the_figures_the_recorder_reads(
    make_clients: Any, experiment: Experiment
) -> None:
    requests = requests_of(experiment)
    answers = make_clients(experiment, 64).train(requests)
    assert sorted(answer.client_id for answer in answers) == sorted(
        request.client_id for request in requests
    )
    for answer in answers:
        assert isinstance(answer, Reply) and answer.round == 1
        data = experiment.clients.data[answer.client_id]
        assert answer.num_examples == len(data.train)
        assert set(answer.metrics) == {
            "loss",
            "first_loss",
            "last_loss",
            "steps",
            "response_tokens",
            "tokens",
        }
        assert answer.metrics["steps"] == 3
        shortest, longest = (pick(len(row.response) for row in data.train) for pick in (min, max))
        rows = 3 * min(4, len(data.train))
        assert rows * shortest <= answer.metrics["response_tokens"] <= rows * longest
        assert answer.metrics["tokens"] > answer.metrics["response_tokens"]


def test_training_acts_and_the_request_is_left_alone(
    make_clients: Any, experiment: Experiment
) -> None:
    requests = requests_of(experiment)
    before = [digest(request.payload.tensors["adapter"]) for request in requests]
    trained = replies_of(make_clients(experiment, 64).train(requests))
    assert [digest(request.payload.tensors["adapter"]) for request in requests] == before
    assert all(
        distance(trained[request.client_id], request.payload.tensors["adapter"]) > 0.1
        for request in requests
    )


def test_the_same_request_twice_gives_the_same_reply(
    make_clients: Any, experiment: Experiment
) -> None:
    engine, requests = make_clients(experiment, 64), requests_of(experiment)
    first, second = engine.train(requests), engine.train(requests)
    assert hashes(replies_of(first)) == hashes(replies_of(second))
    assert [answer.metrics for answer in first if isinstance(answer, Reply)] == [
        answer.metrics for answer in second if isinstance(answer, Reply)
    ]


def test_what_is_trained_in_between_leaves_no_trace(
    make_clients: Any, experiment: Experiment
) -> None:
    engine, requests = make_clients(experiment, 64), requests_of(experiment)
    first = hashes(replies_of(engine.train(requests)))
    engine.train(requests_of(experiment, 2)[:3])
    assert (
        hashes(replies_of(engine.train(requests)))
        == first
        == hashes(replies_of(make_clients(experiment, 64).train(requests)))
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_order_of_requests_and_the_company_change_rounding_only(
    dropout: float, make_clients: Any, base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    experiment = built(base, base_folder, clients_folder, adapter__dropout=dropout, **STEADY)
    requests = requests_of(experiment)
    together = replies_of(make_clients(experiment, 64).train(requests))
    backwards = replies_of(make_clients(experiment, 64).train(requests[::-1]))
    alone = {
        request.client_id: adapter
        for request in requests
        for adapter in replies_of(make_clients(experiment, 64).train([request])).values()
    }
    assert largest_share(together, backwards, requests) < TOLERANCE
    assert largest_share(together, alone, requests) < TOLERANCE


@pytest.mark.parametrize("cohort_size", [1, 2, 3])
def test_clients_in_turn_equal_clients_side_by_side(
    cohort_size: int, make_clients: Any, base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    experiment = built(base, base_folder, clients_folder, **STEADY)
    requests = requests_of(experiment)
    side_by_side, in_turn = (
        replies_of(make_clients(experiment, size).train(requests)) for size in (64, cohort_size)
    )
    assert list(in_turn) == [request.client_id for request in requests]
    assert largest_share(side_by_side, in_turn, requests) < TOLERANCE


@remembers
def test_a_plain_client_keeps_nothing(make_clients: Any, experiment: Experiment) -> None:
    engine = make_clients(experiment, 64)
    engine.train(requests_of(experiment))
    assert engine.memories == {}


@pytest.fixture
def keeping(base: BaseModel, base_folder: Path, clients_folder: Path) -> Experiment:
    return built(base, base_folder, clients_folder, local__optimizer_state="kept")


@remembers
def test_memories_belong_to_their_clients_and_are_used(
    make_clients: Any, keeping: Experiment
) -> None:
    engine, requests = make_clients(keeping, 64), requests_of(keeping)
    first = hashes(replies_of(engine.train(requests[:2])))
    assert set(engine.memories) == {request.client_id for request in requests[:2]}
    assert {memory.scalars["optimizer.steps"] for memory in engine.memories.values()} == {3.0}
    untouched = {
        client: {part: digest(adapter) for part, adapter in memory.tensors.items()}
        for client, memory in engine.memories.items()
    }
    second = hashes(replies_of(engine.train(requests[:1])))
    assert second[requests[0].client_id] != first[requests[0].client_id], (
        "moments of the first exchange must carry over"
    )
    assert engine.memories[requests[0].client_id].scalars["optimizer.steps"] == 6.0
    other = requests[1].client_id
    assert {
        part: digest(adapter) for part, adapter in engine.memories[other].tensors.items()
    } == untouched[other]


@remembers
def test_restored_memories_continue_bit_for_bit(make_clients: Any, keeping: Experiment) -> None:
    engine, requests = make_clients(keeping, 64), requests_of(keeping)
    engine.train(requests)
    kept = engine.memories
    expected = hashes(replies_of(engine.train(requests_of(keeping, 2))))
    fresh = make_clients(keeping, 64)
    fresh.restore(kept)
    assert hashes(replies_of(fresh.train(requests_of(keeping, 2)))) == expected
    assert hashes(replies_of(make_clients(keeping, 64).train(requests_of(keeping, 2)))) != expected


@remembers
def test_a_copy_of_the_memories_is_handed_out(make_clients: Any, keeping: Experiment) -> None:
    engine = make_clients(keeping, 64)
    engine.train(requests_of(keeping)[:1])
    before = engine.memories
    engine.train(requests_of(keeping)[1:2])
    assert len(before) == 1 and len(engine.memories) == 2


@remembers
def test_a_client_that_diverges_fails_alone_and_keeps_its_memory(
    make_clients: Any, keeping: Experiment
) -> None:
    requests = requests_of(keeping)
    engine, healthy = make_clients(keeping, 64), make_clients(keeping, 64)
    for each in (engine, healthy):
        each.train(requests)
    kept = engine.memories[requests[1].client_id]
    huge = {
        name: torch.full_like(tensor, 1e30)
        for name, tensor in requests[1].payload.tensors["adapter"].items()
    }
    spoiled = [*requests]
    spoiled[1] = Request(
        requests[1].client_id, 1, requests[1].seed, type(requests[1].payload)({"adapter": huge})
    )
    answers = {answer.client_id: answer for answer in engine.train(spoiled)}
    failure = answers.pop(requests[1].client_id)
    assert isinstance(failure, Failure) and (failure.round, failure.stage) == (1, "train")
    assert "non-finite loss at local step 1" in failure.reason
    assert engine.memories[requests[1].client_id] is kept
    expected = replies_of(healthy.train(requests))
    del expected[requests[1].client_id]
    others = [request for request in requests if request.client_id != failure.client_id]
    assert largest_share(replies_of(list(answers.values())), expected, others) < TOLERANCE
