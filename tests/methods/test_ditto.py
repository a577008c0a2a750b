"""Ditto: rounds take turns, personal adapters are pulled towards the shared one and never sent."""

from __future__ import annotations

import torch

from fedmira.adapters import digest, map_tensors, weighted_sum
from fedmira.methods import Ditto
from lora_federation import context, descend, lora, names, play, start, started

FEDERATION = context([3, 3], [10, 30])
CENTRES = {client: lora(3, 7 + k) for k, client in enumerate(names(2))}
STEPS, RATE = 3, 0.25


def test_the_first_round_trains_the_shared_adapter_and_the_second_the_personal_ones() -> None:
    """A client's own way to its personal optimum, from the common start v0.

    v_n = v* + (1 - rate (1 + lambda))^n (v0 - v*) with v* = (c + lambda w) / (1 + lambda).
    """
    pull = 0.5
    algorithm = Ditto(personal_pull=pull).for_federation(FEDERATION)
    first, _ = play(algorithm, FEDERATION, started(algorithm, FEDERATION), CENTRES, 1, STEPS, RATE)
    common = start(3)
    alone = [
        map_tensors(lambda c, w: c + (1 - RATE) ** STEPS * (w - c), CENTRES[client], common)
        for client in names(2)
    ]
    shared = weighted_sum(alone, [0.25, 0.75])
    for client in names(2):
        assert digest(algorithm.adapter_for(first, client)) == digest(common)
        assert set(algorithm.instruct(first, client).tensors) == {"adapter", "shared"}
    second, _ = play(algorithm, FEDERATION, first, CENTRES, 2, STEPS, RATE)
    for client in names(2):
        for name, found in algorithm.adapter_for(second, client).items():
            resting = (CENTRES[client][name] + pull * shared[name]) / (1 + pull)
            expected = resting + (1 - RATE * (1 + pull)) ** STEPS * (common[name] - resting)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, sent in algorithm.instruct(second, "client-0").tensors["adapter"].items():
        torch.testing.assert_close(sent, shared[name], rtol=1e-5, atol=1e-5)


def test_without_a_pull_the_personal_adapters_are_local_training_with_half_of_the_steps() -> None:
    algorithm = Ditto(personal_pull=0).for_federation(FEDERATION)
    state = started(algorithm, FEDERATION)
    for number in range(1, 5):
        state, _ = play(algorithm, FEDERATION, state, CENTRES, number, STEPS, RATE)
    for client in names(2):
        expected = map_tensors(
            lambda c, w: c + (1 - RATE) ** (2 * STEPS) * (w - c), CENTRES[client], start(3)
        )
        for name, found in algorithm.adapter_for(state, client).items():
            torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-5)


def test_turns_are_counted_for_each_client() -> None:
    """client-1 joins in round 2: its first turn is for the shared adapter.

    It alone then makes the mean.
    """
    algorithm = Ditto().for_federation(FEDERATION)
    state, _ = play(
        algorithm,
        FEDERATION,
        started(algorithm, FEDERATION),
        {"client-0": CENTRES["client-0"]},
        1,
        STEPS,
        RATE,
    )
    begun = algorithm.begin(algorithm.instruct(state, "client-1"), None)
    state, _ = play(algorithm, FEDERATION, state, CENTRES, 2, STEPS, RATE)
    assert state.numbers["turns"].tolist() == [2, 1]
    shared = descend(begun, CENTRES["client-1"], STEPS, RATE)
    sent = algorithm.instruct(state, "client-0").tensors["adapter"]
    assert all(torch.equal(sent[name], tensor) for name, tensor in shared.items())
    assert digest(algorithm.adapter_for(state, "client-1")) == digest(start(3))
    assert digest(algorithm.adapter_for(state, "client-0")) != digest(start(3))


def test_of_personal_adapters_nothing_travels() -> None:
    algorithm = Ditto().for_federation(FEDERATION)
    state = started(algorithm, FEDERATION)
    whole = 4 * sum(tensor.numel() for tensor in start(3).values())
    for number, up in ((1, whole), (2, 0), (3, whole), (4, 0)):
        assert algorithm.instruct(state, "client-0").num_bytes == whole
        state, sent = play(algorithm, FEDERATION, state, CENTRES, number)
        assert [reply.payload.num_bytes for reply in sent] == [up, up]
