"""The loop alone: what it hands to method and clients.

Absent clients, failed rounds and stuck adapters among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmira.adapters import digest
from fedmira.clients import Clients
from fedmira.config import RoundsSettings
from fedmira.errors import AlignmentError, RoundError
from fedmira.experiment import build_experiment
from fedmira.messages import (
    ClientId,
    Failure,
    Payload,
    Reply,
    Request,
)
from fedmira.model import BaseModel
from fedmira.rounds import RoundOutcome, run_rounds
from fedmira.seeds import seed_for
from small import make_config, run_loop

METHODS: dict[str, dict[str, Any]] = {
    "local": {"algorithm.name": "local"},
    "fedavg": {"algorithm.name": "fedavg"},
    "mira, product space": {"graph.kind": "category"},
    "mira, factor space": {
        "graph.kind": "random",
        "algorithm.space": "factor",
        "algorithm.neighbours": "rescaled",
    },
    "mira, learned graph": {
        "graph.kind": "similarity",
        "graph.warmup_rounds": 0,
        "rounds.count": 4,
    },
}

every_algorithm = pytest.mark.parametrize("name", METHODS)


@dataclass
class Watched:
    """Clients around clients: notes what passes, and answers with failures where it is told to.

    Attributes:
        fails: (round, client) pairs that fail after their training.
        reverse: whether answers come back in the reverse order of the requests.
    """

    inner: Clients
    fails: frozenset[tuple[int, str]] = frozenset()
    reverse: bool = False
    seen: list[Request] = field(default_factory=list)

    @property
    def memories(self) -> Mapping[ClientId, Payload]:
        return self.inner.memories

    def restore(self, memories: Mapping[ClientId, Payload]) -> None:
        self.inner.restore(memories)

    def train(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        self.seen += requests
        answers = [
            Failure(answer.client_id, answer.round, "train", "the power went out")
            if (answer.round, answer.client_id) in self.fails
            else answer
            for answer in self.inner.train(requests)
        ]
        return answers[::-1] if self.reverse else answers


def run_watched(
    base: BaseModel, base_folder: Path, clients_folder: Path, settings: dict[str, Any], **watch: Any
) -> tuple[Watched, list[RoundOutcome]]:
    experiment = build_experiment(make_config(base_folder, clients_folder, settings), base)
    workers, outcomes = Watched(experiment.clients, **watch), []
    state = experiment.algorithm.initial_state(experiment.starts)
    run_rounds(
        experiment.algorithm,
        workers,
        state,
        list(experiment.ranks),
        experiment.config.rounds,
        experiment.config.seed,
        outcomes.append,
    )
    return workers, outcomes


def moved_in(outcome: RoundOutcome) -> set[str]:
    """Clients that the combine step says it moved."""
    return {
        client
        for client, figures in outcome.combined.diagnostics.clients.items()
        if figures.get("relative_pull", 0.0) > 0
    }


@every_algorithm
def test_a_client_that_was_not_sampled_keeps_its_own_adapter_bit_for_bit(
    name: str, base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    config = make_config(
        base_folder,
        clients_folder,
        {**METHODS[name], "rounds.participation": 0.4, "rounds.count": 4},
    )
    experiment, states, outcomes = run_loop(config, base)
    absences = 0
    for before, outcome, after in zip(states[:-1], outcomes, states[1:], strict=True):
        present = {request.client_id for request in outcome.requests}
        assert len(present) == 2
        for client in (
            set(before.adapters) & set(experiment.ranks) - present
        ):  # FedAvg's one shared adapter belongs to nobody
            absences += 1
            assert digest(after.adapters[client]) == digest(before.adapters[client])
        for client in present:
            assert digest(experiment.algorithm.adapter_for(after, client)) != digest(
                experiment.algorithm.adapter_for(before, client)
            )
    assert absences == (0 if name == "fedavg" else 4 * 3)


@every_algorithm
@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_what_was_combined_is_what_the_client_trains_from_next(
    name: str, participation: float, base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    """The defect of a public implementation.

    Aggregates are written to disk and never loaded again (algorithm reference 1.7).
    """
    settings = {**METHODS[name], "rounds.participation": participation, "rounds.count": 4}
    experiment, states, _ = run_loop(
        config := make_config(base_folder, clients_folder, settings), base
    )
    workers, outcomes = run_watched(base, base_folder, clients_folder, settings)
    by_round = {
        outcome.round: {reply.client_id: reply for reply in outcome.replies} for outcome in outcomes
    }
    loaded_again = 0
    for request in workers.seen:
        expected = experiment.algorithm.adapter_for(states[request.round - 1], request.client_id)
        begun = experiment.algorithm.begin(request.payload, None).adapter
        assert digest(begun) == digest(request.payload.tensors["adapter"]) == digest(expected)
        assert request.seed == seed_for(config.seed, "train", request.round, request.client_id)
        earlier = [
            outcomes[t - 1] for t in range(1, request.round) if request.client_id in by_round[t]
        ]
        if earlier:
            sent = by_round[earlier[-1].round][request.client_id].payload.tensors["adapter"]
            # A client without an edge in the learned graph stays; nobody else may.
            combined = name == "fedavg" or request.client_id in moved_in(earlier[-1])
            assert (digest(begun) != digest(sent)) == combined, (
                "alignment changes what is trained on, and without it nothing does"
            )
            loaded_again += combined == (name != "local")
    assert loaded_again > 0


@pytest.mark.parametrize("graph", ["category", "similarity"])
def test_the_adapter_trained_from_in_round_2_differs_between_coupling_0_and_1(
    graph: str, base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    settings = (
        {"graph.kind": graph, "graph.warmup_rounds": 0, "rounds.count": 2}
        if graph == "similarity"
        else {"graph.kind": graph, "rounds.count": 2}
    )
    runs = [
        run_watched(base, base_folder, clients_folder, {**settings, "algorithm.coupling": coupling})
        for coupling in (0.0, 1.0)
    ]
    loaded = [
        {
            (request.round, request.client_id): digest(request.payload.tensors["adapter"])
            for request in workers.seen
        }
        for workers, _ in runs
    ]
    sent = [
        {reply.client_id: digest(reply.payload.tensors["adapter"]) for reply in outcomes[0].replies}
        for _, outcomes in runs
    ]
    assert sent[0] == sent[1], "round 1 trains alike: nothing has been combined before it"
    moved = moved_in(runs[1][1][0])
    assert moved and all(
        (loaded[0][2, client] != loaded[1][2, client]) == (client in moved) for client in sent[0]
    )


def test_answers_may_come_in_any_order(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    settings = {"graph.kind": "random", "rounds.count": 2}
    (_, forwards), (_, backwards) = (
        run_watched(base, base_folder, clients_folder, settings, reverse=reverse)
        for reverse in (False, True)
    )
    for left, right in zip(forwards, backwards, strict=True):
        assert {
            name: digest(adapter) for name, adapter in left.combined.state.adapters.items()
        } == {name: digest(adapter) for name, adapter in right.combined.state.adapters.items()}


@every_algorithm
def test_a_client_that_fails_keeps_its_adapter_and_the_round_goes_on_as_if_it_were_absent(
    name: str, base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    fails = frozenset({(2, "apple-2")})
    workers, outcomes = run_watched(base, base_folder, clients_folder, METHODS[name], fails=fails)
    assert [(failure.client_id, failure.reason) for failure in outcomes[1].failures] == [
        ("apple-2", "the power went out")
    ]
    assert [len(outcome.replies) for outcome in outcomes[:3]] == [5, 4, 5]
    if name != "fedavg":
        assert digest(outcomes[1].combined.state.adapters["apple-2"]) == digest(
            outcomes[0].combined.state.adapters["apple-2"]
        )
    assert any(request.round == 3 and request.client_id == "apple-2" for request in workers.seen), (
        "it is asked again"
    )


def test_a_round_without_any_reply_ends_the_run_after_it_was_written_down(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    experiment = build_experiment(
        make_config(base_folder, clients_folder, {"algorithm.name": "local"}), base
    )
    workers = Watched(experiment.clients, frozenset((2, client) for client in experiment.ranks))
    outcomes: list[RoundOutcome] = []
    state = experiment.algorithm.initial_state(experiment.starts)
    with pytest.raises(
        RoundError,
        match=r"round 2: none of 5 clients .*apple-1: the power went out.*the adapters of round "
        r"1 are kept",
    ):
        run_rounds(
            experiment.algorithm,
            workers,
            state,
            list(experiment.ranks),
            experiment.config.rounds,
            0,
            outcomes.append,
        )
    assert [outcome.round for outcome in outcomes] == [1, 2] and len(outcomes[1].failures) == 5
    assert outcomes[1].combined.state is outcomes[0].combined.state


def test_a_pull_below_the_resolution_of_float32_is_an_error_and_no_quiet_no_op(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    config = make_config(
        base_folder, clients_folder, {"graph.kind": "uniform", "algorithm.server_step": 1e-12}
    )
    with pytest.raises(
        AlignmentError,
        match=r"round 1: alignment is on but did not move apple-1.*raise algorithm.coupling or "
        r"algorithm.server_step",
    ):
        run_loop(config, base)


def test_the_loop_continues_at_a_given_round_with_equal_results(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    config = make_config(
        base_folder,
        clients_folder,
        {"graph.kind": "random", "rounds.participation": 0.6, "rounds.count": 4},
    )
    _, states, _ = run_loop(config, base)
    experiment = build_experiment(config, base)
    rounds: list[int] = []
    last = run_rounds(
        experiment.algorithm,
        experiment.clients,
        states[2],
        list(experiment.ranks),
        config.rounds,
        config.seed,
        lambda o: rounds.append(o.round),
        first_round=3,
    )
    assert rounds == [3, 4]
    assert {name: digest(adapter) for name, adapter in last.adapters.items()} == {
        name: digest(adapter) for name, adapter in states[4].adapters.items()
    }
    assert all(
        torch.equal(tensor, states[4].numbers[name]) for name, tensor in last.numbers.items()
    )


def test_rounds_that_lie_behind_are_not_run(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    experiment = build_experiment(make_config(base_folder, clients_folder), base)
    state = experiment.algorithm.initial_state(experiment.starts)
    workers = Watched(experiment.clients)
    assert (
        run_rounds(
            experiment.algorithm,
            workers,
            state,
            list(experiment.ranks),
            RoundsSettings(count=3),
            0,
            lambda _: None,
            first_round=4,
        )
        is state
    )
    assert workers.seen == []
