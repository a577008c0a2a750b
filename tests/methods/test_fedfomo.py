"""FedFomo: weights by first-order improvement, and whom the server sends.

Clients measure on their own validation rows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.adapters import Adapter, digest
from fedmira.errors import ConfigError
from fedmira.graphs import FixedGraph, uniform_graph
from fedmira.messages import Payload, Reply, Request
from fedmira.methods import (
    FedFomo,
    Local,
    Method,
    MethodContext,
    ServerState,
    Trained,
)
from fedmira.methods.fedfomo import first_order_weights
from fedmira.model import BaseModel
from lora_federation import best_of_rank, context, dense, lora, play, started
from small import cohort_of, make_config, run_loop

RANK = 3


def no_graph() -> FixedGraph:
    """For federations so large that the graph of all pairs is refused; fedfomo reads none."""
    return FixedGraph(uniform_graph(["a", "b"]))


def begun(count: int, candidates: int = 2) -> tuple[MethodContext, Method, ServerState]:
    federation = context([RANK] * count)
    algorithm = FedFomo(candidates=candidates).for_federation(federation)
    return federation, algorithm, started(algorithm, federation)


def sent_to(algorithm: Method, state: ServerState, client: str) -> list[str]:
    """Whose adapters a client is sent, in order."""
    owners = {digest(adapter): name for name, adapter in state.adapters.items()}
    tensors = algorithm.instruct(state, client).tensors
    return [owners[digest(tensors[name])] for name in tensors if name != "adapter"]


def test_weights_by_hand() -> None:
    """Gains of 1, 2 and -1 at distances 2, 1 and 1: slopes 0.5, 2 and none."""
    assert first_order_weights(3.0, [2.0, 1.0, 4.0], [2.0, 1.0, 1.0]) == pytest.approx(
        [0.2, 0.8, 0.0]
    )


@settings(deadline=None, max_examples=50)
@given(
    before=st.floats(0, 10),
    measured=st.lists(
        st.tuples(st.floats(0, 10) | st.just(math.inf), st.just(0.0) | st.floats(1e-3, 10)),
        max_size=6,
    ),
)
def test_weights_are_shares_of_what_is_better_and_apart_and_of_nothing_else(
    before: float, measured: list[tuple[float, float]]
) -> None:
    weights = first_order_weights(
        before, [loss for loss, _ in measured], [distance for _, distance in measured]
    )
    useful = [loss < before and distance > 0 for loss, distance in measured]
    assert all((weight > 0) <= use for weight, use in zip(weights, useful, strict=True))
    assert sum(weights) == pytest.approx(1 if any(weights) else 0)


def test_nobody_is_sent_anything_before_it_has_trained_and_then_new_ones_come_in_turn() -> None:
    federation, algorithm, state = begun(5)
    clients = federation.clients
    assert [sent_to(algorithm, state, client) for client in clients] == [[]] * 5
    centres = {client: lora(RANK, 10 + k) for k, client in enumerate(clients)}
    state, _ = play(
        algorithm, federation, state, {client: centres[client] for client in clients[:4]}, 1
    )
    assert sent_to(algorithm, state, clients[4]) == []
    assert sent_to(algorithm, state, clients[2]) == [clients[3], clients[0]]
    state, _ = play(algorithm, federation, state, centres, 2)
    assert sent_to(algorithm, state, clients[2]) == [clients[4], clients[1]]
    assert algorithm.instruct(state, clients[2]).num_bytes == 2 * sum(
        4 * tensor.numel() for tensor in centres[clients[0]].values()
    )


def test_more_clients_than_the_kept_pairs_allow_are_refused_before_anything_is_held() -> None:
    """2,000 clients have 1,999,000 pairs, 2,001 have 2,001,000."""
    FedFomo().for_federation(context([RANK] * 2000, graph=no_graph()))
    with pytest.raises(
        ConfigError,
        match=r"fedfomo: .*2,001,000 pairs of 2,001 clients; at most 2,000,000 .*data\.clients",
    ):
        FedFomo().for_federation(context([RANK] * 2001, graph=no_graph()))


def test_half_of_the_places_go_to_those_who_helped_most() -> None:
    federation, algorithm, state = begun(6, candidates=2)
    clients = federation.clients
    state, _ = play(
        algorithm,
        federation,
        state,
        {client: lora(RANK, 10 + k) for k, client in enumerate(clients)},
        1,
    )
    state.numbers["preference"][0, 3], state.numbers["preference"][0, 5] = 0.5, 0.7
    state.numbers["sent"][0, [1, 3, 5]] = True
    assert sent_to(algorithm, state, clients[0]) == [clients[5], clients[2]]
    state.numbers["sent"][0] = True
    assert sent_to(algorithm, state, clients[0]) == [clients[5], clients[3]]


def test_a_start_is_the_weighted_sum_of_updates_and_its_weights_are_reported_and_kept() -> None:
    """Own adapter, last start and two candidates with losses 1.5, 2, 1 and 3.

    The last one is worse than the start.
    """
    federation, algorithm, state = begun(4)
    client = federation.clients[0]
    state, _ = play(
        algorithm,
        federation,
        state,
        {name: lora(RANK, 10 + k) for k, name in enumerate(federation.clients)},
        1,
    )
    payload = algorithm.instruct(state, client)
    before: Adapter = lora(RANK, 99)
    memory = Payload({"began": before})
    start = algorithm.begin(payload, memory)
    assert start.blend is not None
    own, first = payload.tensors["adapter"], payload.tensors["candidate 0"]
    assert [digest(adapter) for adapter in start.blend.candidates[:2]] == [
        digest(before),
        digest(first),
    ]

    losses = (1.5, 2.0, 1.0, 3.0)
    full, apart = [dense(own), dense(first)], []
    for one in full:
        apart.append(
            math.sqrt(
                sum(
                    float((one[name] - part).square().sum()) for name, part in dense(before).items()
                )
            )
        )
    slopes = [0.5 / apart[0], 1.0 / apart[1]]
    weights = [slope / sum(slopes) for slope in slopes]
    found = start.blend.into(losses)
    for name, part in dense(found).items():
        expected = best_of_rank(weights[0] * full[0][name] + weights[1] * full[1][name], RANK)
        torch.testing.assert_close(
            part, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
        )

    reply, kept = algorithm.finish(
        payload, memory, Trained(lora(RANK, 5), 20, 3, 0.1, losses=losses)
    )
    assert reply.scalars == {"candidate 0": pytest.approx(weights[1]), "candidate 1": 0.0}
    assert kept is not None
    assert digest(kept.tensors["began"]) == digest(found)


def test_where_nothing_is_better_the_last_start_is_taken_again() -> None:
    federation, algorithm, state = begun(3)
    state, _ = play(
        algorithm,
        federation,
        state,
        {name: lora(RANK, 10 + k) for k, name in enumerate(federation.clients)},
        1,
    )
    payload, before = algorithm.instruct(state, federation.clients[0]), lora(RANK, 99)
    start = algorithm.begin(payload, Payload({"began": before}))
    assert start.blend is not None
    assert digest(start.blend.into([2.0, 1.0, 3.0, math.inf])) == digest(before)


def test_the_server_adds_up_what_clients_report() -> None:
    federation, algorithm, state = begun(4)
    centres = {name: lora(RANK, 10 + k) for k, name in enumerate(federation.clients)}
    state, _ = play(algorithm, federation, state, centres, 1)
    _, sent = play(algorithm, federation, state, centres, 2)
    weighed = [
        replace(
            reply, payload=Payload(reply.payload.tensors, {"candidate 0": 0.25, "candidate 1": 0.5})
        )
        for reply in sent
    ]
    after = algorithm.combine(state, weighed).state.numbers
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for k in range(4):
        expected[k, (k + 1) % 4], expected[k, (k + 2) % 4] = 0.25, 0.5
    torch.testing.assert_close(after["preference"], expected)
    assert torch.equal(after["sent"], expected > 0)


def fomo_config(base_folder: Path, clients_folder: Path, **changes: Any) -> Any:
    chosen = {
        "algorithm.name": "fedfomo",
        "algorithm.candidates": 3,
        "local.learning_rate": 0.05,
        "rounds.count": 4,
        **changes,
    }
    return make_config(base_folder, clients_folder, chosen)


def test_clients_measure_candidates_on_validation_rows_and_take_what_is_better(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    experiment, states, outcomes = run_loop(fomo_config(base_folder, clients_folder), base)
    size = sum(4 * tensor.numel() for tensor in next(iter(experiment.starts.values())).values())
    clients = list(experiment.ranks)
    assert all(
        experiment.algorithm.instruct(states[1], client).num_bytes == 3 * size for client in clients
    )
    assert not bool(states[1].numbers["preference"].any())
    assert bool((states[-1].numbers["preference"] > 0).any())
    assert bool(
        (states[-1].numbers["preference"].sum(dim=1) <= 3 + 1e-9).all()
    )  # at most 1 a round
    first, last = (
        {reply.client_id: reply.metrics["tokens"] for reply in outcome.replies}
        for outcome in (outcomes[0], outcomes[-1])
    )
    assert all(last[client] > first[client] for client in clients)  # measuring is counted


def test_a_client_without_validation_rows_trains_on_from_its_own_adapter(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    experiment, states, outcomes = run_loop(
        fomo_config(base_folder, clients_folder, **{"rounds.count": 1}), base
    )
    algorithm, client = experiment.algorithm, outcomes[0].replies[0].client_id
    cohort = cohort_of(experiment, algorithm)
    blind = replace(
        cohort, clients={**cohort.clients, client: replace(cohort.clients[client], validation=())}
    )
    payload = algorithm.instruct(states[1], client)
    memory = {client: Payload({"began": experiment.starts[client]})}
    answers = [each.work([Request(client, 2, 7, payload)], memory)[0] for each in (blind, cohort)]
    replies = [reply for reply, _ in answers if isinstance(reply, Reply)]
    assert [dict(reply.payload.scalars) == {} for reply in replies] == [True, False]
    own = replace(blind, algorithm=Local().for_federation(context([4])))
    alone, _ = own.work(
        [Request(client, 2, 7, Payload({"adapter": payload.tensors["adapter"]}))], {}
    )[0]
    assert isinstance(alone, Reply)
    assert digest(replies[0].payload.tensors["adapter"]) == digest(alone.payload.tensors["adapter"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.validation_fraction": 0.0}, "'fedfomo' needs validation rows"),
        ({"local.optimizer_state": "kept"}, "blended updates get new factors"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    base_folder: Path, clients_folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fomo_config(base_folder, clients_folder, **changes)


@pytest.mark.parametrize(
    ("ranks", "message"), [([4, 8], "needs one rank"), ([4], "nobody to be sent")]
)
def test_federations_that_cannot_work_are_refused(ranks: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FedFomo().for_federation(context(ranks))
