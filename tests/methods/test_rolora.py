"""RoLoRA: factors take turns, the average is exact, and what travels suffices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedmira.adapters import Adapter, digest, weighted_sum
from fedmira.config import load_config
from fedmira.errors import ConfigError
from fedmira.methods import FedAvg, RoLora, Trained
from fedmira.methods.parts.partly_sent import PartlySent
from lora_federation import context, dense, lora, names, play, start, started

ROWS = [10, 30, 20]
FEDERATION = context([3, 3, 3], ROWS)
CENTRES = {client: lora(3, 30 + k) for k, client in enumerate(names(3))}
MARK = {"A": ".lora_A.", "B": ".lora_B."}


def factor(adapter: Adapter, which: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in adapter.items() if MARK[which] in name}


def test_b_is_first_and_then_they_take_turns_with_the_other_one_the_same_bit_for_bit() -> None:
    algorithm = RoLora().for_federation(FEDERATION)
    state = started(algorithm, FEDERATION)
    for number, (moves, rests) in enumerate([("B", "A"), ("A", "B"), ("B", "A")], start=1):
        before = algorithm.adapter_for(state, "client-0")
        state, sent = play(algorithm, FEDERATION, state, CENTRES, number)
        after = algorithm.adapter_for(state, "client-0")
        assert digest(factor(after, rests)) == digest(factor(before, rests))
        shares = [reply.num_examples / 60 for reply in sent]
        parts = [factor(reply.payload.tensors["adapter"], moves) for reply in sent]
        for name, mean in weighted_sum(parts, shares).items():
            torch.testing.assert_close(after[name], mean, rtol=1e-6, atol=1e-6)
            assert not torch.equal(after[name], before[name])


def test_the_shared_product_is_the_mean_of_the_clients_products_which_fedavg_misses() -> None:
    found = {}
    for algorithm in (RoLora(), FedAvg()):
        bound = algorithm.for_federation(FEDERATION)
        state, worst = started(bound, FEDERATION), 0.0
        for number in (1, 2, 3):
            state, sent = play(bound, FEDERATION, state, CENTRES, number)
            for module, product in dense(bound.adapter_for(state, "client-1")).items():
                mean = sum(
                    reply.num_examples / 60 * dense(reply.payload.tensors["adapter"])[module]
                    for reply in sent
                )
                worst = max(worst, float((product - mean).norm() / mean.norm()))
        found[bound.name] = worst
    assert found["rolora"] < 1e-6 < 1e-2 < found["fedavg"]


@settings(max_examples=25)
@given(st.lists(st.sets(st.sampled_from(names(3)), min_size=1), min_size=1, max_size=6))
def test_a_client_that_keeps_what_it_was_sent_always_has_the_whole_adapter(
    rounds: list[set[str]],
) -> None:
    algorithm = RoLora().for_federation(FEDERATION)
    state = started(algorithm, FEDERATION)
    held: dict[str, dict[str, torch.Tensor]] = {client: {} for client in names(3)}
    for number, cohort in enumerate(rounds, start=1):
        for client in sorted(cohort):
            payload = algorithm.instruct(state, client)
            assert isinstance(payload, PartlySent)
            held[client] |= payload.sent["changed"]
            assert digest(held[client]) == digest(algorithm.adapter_for(state, client))
        some = {client: CENTRES[client] for client in sorted(cohort)}
        state, _ = play(algorithm, FEDERATION, state, some, number)


def test_one_factor_travels_and_both_where_a_client_missed_a_round() -> None:
    algorithm = RoLora().for_federation(FEDERATION)
    size = {
        which: 4 * sum(tensor.numel() for tensor in factor(start(3), which).values())
        for which in "AB"
    }
    mark = 8  # the number that says whose turn it is
    whole = size["A"] + size["B"] + mark
    state = started(algorithm, FEDERATION)
    for number, (trained, changed) in enumerate(["B-", "AB", "BA"], start=1):
        down = {client: algorithm.instruct(state, client).num_bytes for client in names(3)}
        expected = whole if changed == "-" else size[changed] + mark
        assert down["client-0"] == down["client-1"] == expected
        assert down["client-2"] == whole, "it has never been there"
        state, sent = play(algorithm, FEDERATION, state, {c: CENTRES[c] for c in names(2)}, number)
        assert {reply.payload.num_bytes for reply in sent} == {size[trained]}


@pytest.mark.parametrize("rounds_before", [0, 1])
def test_a_frozen_factor_is_put_back_whatever_weight_decay_did(rounds_before: int) -> None:
    algorithm = RoLora().for_federation(FEDERATION)
    state = started(algorithm, FEDERATION)
    for number in range(rounds_before):
        state, _ = play(algorithm, FEDERATION, state, CENTRES, number + 1)
    payload = algorithm.instruct(state, "client-0")
    decayed = {name: 0.99 * tensor for name, tensor in CENTRES["client-0"].items()}
    answer, _ = algorithm.finish(payload, None, Trained(decayed, 10, 5, 1e-3))
    trained = "BA"[rounds_before]
    for name, tensor in answer.tensors["adapter"].items():
        expected = decayed if MARK[trained] in name else payload.tensors["adapter"]
        assert torch.equal(tensor, expected[name])


def test_a_round_without_a_usable_reply_is_no_turn() -> None:
    """The server's state is then the one before, and B is trained again."""
    algorithm = RoLora().for_federation(FEDERATION)
    state = started(algorithm, FEDERATION)
    state, _ = play(algorithm, FEDERATION, state, CENTRES, 2)
    given = algorithm.adapter_for(state, "client-0")
    assert digest(factor(given, "A")) == digest(factor(start(3), "A"))
    assert all(bool(tensor.any()) for tensor in factor(given, "B").values())


def test_different_ranks_and_kept_moments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rolora: client 'client-0' has rank 2"):
        RoLora().for_federation(context([2, 3]))
    with pytest.raises((ConfigError, ValidationError), match="would move the one that is frozen"):
        load_config(overrides=["algorithm.name=rolora", "local.optimizer_state=kept"])
