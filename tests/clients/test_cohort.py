"""The client side of a round.

It trains from the adapter that the algorithm begins with, at each client's own rank and scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmira.adapters import Adapter, digest
from fedmira.experiment import Experiment, build_experiment
from fedmira.messages import (
    ClientId,
    Failure,
    Payload,
    Reply,
    Request,
)
from fedmira.methods import (
    Combined,
    Method,
    ServerState,
    Start,
    Trained,
)
from fedmira.model import BaseModel
from small import Wrapping, cohort_of, make_config


def built(
    base: BaseModel, base_folder: Path, clients_folder: Path, settings: Mapping[str, Any]
) -> Experiment:
    return build_experiment(
        make_config(base_folder, clients_folder, {"algorithm.name": "local", **settings}), base
    )


def requests_of(experiment: Experiment) -> list[Request]:
    return [
        Request(client, 1, 11, Payload({"adapter": start}))
        for client, start in experiment.starts.items()
    ]


def noisy(start: Adapter, seed: int) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in start.items()
    }


@dataclass(frozen=True)
class Scribbling(Wrapping):
    """Local training with a client half that does all that the contract allows.

    It starts elsewhere, hooks gradients, and keeps a memory.
    """

    inner: Method
    factor: float

    @property
    def aligns(self) -> bool:
        return False

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        return self.inner.initial_state(starts)

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        return self.inner.instruct(state, client)

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        return self.inner.combine(state, replies)

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        return self.inner.adapter_for(state, client)

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        return Start(
            payload.tensors["adapter"],
            lambda gradient, _: {name: self.factor * tensor for name, tensor in gradient.items()},
        )

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        visits = (memory.scalars["visits"] if memory else 0.0) + 1
        return Payload({"adapter": trained.adapter}, {"steps": float(trained.num_steps)}), Payload(
            {"own": trained.adapter}, {"visits": visits}
        )


def test_the_first_loss_is_that_of_the_adapter_that_was_sent(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    """One step over all rows, whose loss is the training loss of the payload's adapter.

    The evaluator measures the same.
    """
    experiment = built(
        base, base_folder, clients_folder, {"local.steps": 1, "local.batch_size": 100}
    )
    sent = {client: noisy(start, k) for k, (client, start) in enumerate(experiment.starts.items())}
    requests = [
        Request(client, 1, 11, Payload({"adapter": adapter})) for client, adapter in sent.items()
    ]
    expected = experiment.clients.losses(sent, "train")
    for answer, _ in cohort_of(experiment, experiment.algorithm).work(requests, {}):
        assert isinstance(answer, Reply)
        assert answer.metrics["first_loss"] == pytest.approx(
            expected[answer.client_id].per_token, rel=1e-5
        )
        assert answer.metrics["response_tokens"] == expected[answer.client_id].tokens


def test_every_client_trains_at_its_own_rank(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    experiment = built(
        base, base_folder, clients_folder, {"adapter.ranks": {"apple-1": 2, "birch-2": 8}}
    )
    ranks = {}
    for request, (answer, _) in zip(
        requests_of(experiment),
        cohort_of(experiment, experiment.algorithm).work(requests_of(experiment), {}),
        strict=True,
    ):
        assert isinstance(answer, Reply)
        ranks[request.client_id] = {
            tensor.shape[0]
            for name, tensor in answer.payload.tensors["adapter"].items()
            if ".lora_A." in name
        }
    assert ranks == {"apple-1": {2}, "apple-2": {4}, "apple-3": {4}, "birch-1": {4}, "birch-2": {8}}
    assert experiment.clients.settings.scales == {
        "apple-1": 4.0,
        "apple-2": 2.0,
        "apple-3": 2.0,
        "birch-1": 2.0,
        "birch-2": 1.0,
    }  # alpha 8


def test_the_client_half_of_the_algorithm_is_obeyed(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    experiment = built(
        base,
        base_folder,
        clients_folder,
        {"local.optimizer": "sgd", "local.learning_rate": 1.0, "local.max_grad_norm": 0.0},
    )
    held = cohort_of(experiment, Scribbling(experiment.algorithm, 0.0)).work(
        requests_of(experiment), {}
    )
    for answer, memory in held:
        assert isinstance(answer, Reply) and memory is not None
        assert digest(answer.payload.tensors["adapter"]) == digest(
            experiment.starts[answer.client_id]
        ), "a zero gradient moves nothing"
        assert answer.payload.scalars == {"steps": 2.0} and memory.scalars == {"visits": 1.0}
    again = cohort_of(experiment, Scribbling(experiment.algorithm, 1.0)).work(
        requests_of(experiment), {"apple-1": Payload({}, {"visits": 4.0})}
    )
    visits = {
        answer.client_id: memory.scalars["visits"] for answer, memory in again if memory is not None
    }
    assert visits == {
        "apple-1": 5.0,
        "apple-2": 1.0,
        "apple-3": 1.0,
        "birch-1": 1.0,
        "birch-2": 1.0,
    }


def test_a_memory_of_the_algorithm_and_kept_moments_live_side_by_side(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    experiment = built(base, base_folder, clients_folder, {"local.optimizer_state": "kept"})
    cohort = cohort_of(experiment, Scribbling(experiment.algorithm, 1.0))
    first = {
        answer.client_id: memory for answer, memory in cohort.work(requests_of(experiment), {})
    }
    kept = {client: memory for client, memory in first.items() if memory is not None}
    assert {name for memory in kept.values() for name in memory.tensors} == {
        "own",
        "optimizer.first",
        "optimizer.second",
    }
    second = dict(
        (answer.client_id, memory) for answer, memory in cohort.work(requests_of(experiment), kept)
    )
    assert {
        (memory.scalars["visits"], memory.scalars["optimizer.steps"])
        for memory in second.values()
        if memory is not None
    } == {(2.0, 4.0)}


def test_gradients_that_run_away_are_a_failure_and_no_reply(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    experiment = built(base, base_folder, clients_folder, {})
    answers = cohort_of(experiment, Scribbling(experiment.algorithm, float("inf"))).work(
        requests_of(experiment), {"apple-1": Payload({}, {"visits": 4.0})}
    )
    for answer, memory in answers:
        assert isinstance(answer, Failure) and answer.stage == "train"
        assert (memory is not None) == (answer.client_id == "apple-1"), (
            "after a failure a client has the memory it had before"
        )


def test_a_reply_that_is_not_finite_never_leaves_the_client(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    @dataclass(frozen=True)
    class Spoiling(Scribbling):
        def finish(
            self, payload: Payload, memory: Payload | None, trained: Trained
        ) -> tuple[Payload, Payload | None]:
            return Payload(
                {"adapter": trained.adapter, "extra": {"x": torch.tensor([float("nan")])}}
            ), None

    experiment = built(base, base_folder, clients_folder, {})
    for answer, _ in cohort_of(experiment, Spoiling(experiment.algorithm, 1.0)).work(
        requests_of(experiment), {}
    ):
        assert (
            isinstance(answer, Failure)
            and answer.stage == "reply"
            and "non-finite" in answer.reason
        )
