"""FedDPA: halves take turns, the global one is averaged, the personal ones are never sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedmira.adapters import Adapter, digest, map_tensors, weighted_sum
from fedmira.config import load_config
from fedmira.errors import ConfigError
from fedmira.methods import FedDpa, Trained
from fedmira.methods.parts.partly_sent import PartlySent
from fedmira.methods.parts.rank_split import RankSplit
from lora_federation import context, dense, lora, names, play, start, started

RANK, STEPS, RATE = 5, 3, 0.25
FEDERATION = context([RANK, RANK], [10, 30])
CENTRES = {client: lora(RANK, 7 + k) for k, client in enumerate(names(2))}
SPLIT = RankSplit(2)
GLOBAL, WHOLE = (
    4 * sum(tensor.numel() for tensor in adapter.values()) for adapter in (lora(2, 0), lora(5, 0))
)
MARK = 8  # the number that says whose turn it is


def moved(begun: Adapter, centre: Adapter) -> Adapter:
    """Gradient descent on 1/2 |w - centre|^2 in closed form."""
    return map_tensors(lambda c, w: c + (1 - RATE) ** STEPS * (w - c), centre, begun)


def after(rounds: int, **settings: Any) -> tuple[Any, Any]:
    algorithm = FedDpa(global_rank=2, **settings).for_federation(FEDERATION)
    state = started(algorithm, FEDERATION)
    for number in range(1, rounds + 1):
        state, _ = play(algorithm, FEDERATION, state, CENTRES, number, STEPS, RATE)
    return algorithm, state


def assert_close(found: Adapter, expected: Adapter) -> None:
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


def test_the_first_round_trains_the_global_half_alone_and_averages_it_by_rows() -> None:
    algorithm, state = after(1)
    common = start(RANK)
    alone = [moved(SPLIT.trained(common), SPLIT.trained(CENTRES[client])) for client in names(2)]
    mean = weighted_sum(alone, [0.25, 0.75])
    for client in names(2):
        found = algorithm.adapter_for(state, client)
        assert_close(SPLIT.trained(found), mean)
        assert digest(SPLIT.frozen(found)) == digest(SPLIT.frozen(common))


@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
def test_the_second_round_trains_the_personal_half_beside_what_its_share_leaves_of_the_global_one(
    share: float,
) -> None:
    algorithm, first = after(1, own_share=share)
    _, second = after(2, own_share=share)
    before = dense(SPLIT.trained(algorithm.adapter_for(first, "client-0")))
    for client in names(2):
        begun = algorithm.instruct(first, client).tensors["adapter"]
        found = algorithm.adapter_for(second, client)
        own = moved(SPLIT.frozen(start(RANK)), SPLIT.frozen(CENTRES[client]))
        assert_close(SPLIT.frozen(found), own)
        for module, product in dense(SPLIT.trained(found)).items():
            torch.testing.assert_close(product, (1 - share) * before[module], rtol=1e-5, atol=1e-6)
        for module, product in dense(found).items():
            torch.testing.assert_close(
                product, (1 - share) * before[module] + dense(own)[module], rtol=1e-5, atol=1e-5
            )
        assert digest(SPLIT.trained(found)) == digest(SPLIT.trained(begun))


def test_the_third_round_trains_the_global_half_without_the_personal_one_which_stays() -> None:
    algorithm, second = after(2)
    given = algorithm.instruct(second, "client-0").tensors["adapter"]
    _, first = after(1)
    assert digest(SPLIT.trained(given)) == digest(
        SPLIT.trained(algorithm.adapter_for(first, "client-0"))
    ), "whole, as it was averaged"
    assert not any(bool(product.any()) for product in dense(SPLIT.frozen(given)).values())
    _, third = after(3)
    for client in names(2):
        own, kept = (
            SPLIT.frozen(algorithm.adapter_for(state, client)) for state in (third, second)
        )
        assert digest(own) == digest(kept)


def test_training_one_client_leaves_the_personal_half_of_another_alone() -> None:
    algorithm, state = after(2)
    later, _ = play(algorithm, FEDERATION, state, {"client-0": CENTRES["client-0"]}, 3)
    later, _ = play(algorithm, FEDERATION, later, {"client-0": CENTRES["client-0"]}, 4)
    assert later.adapters["client-1"] is state.adapters["client-1"]
    assert digest(later.adapters["client-0"]) != digest(state.adapters["client-0"])


def test_turns_are_counted_for_each_client() -> None:
    """client-1 joins in round 2 with its first turn, and then alone makes the mean."""
    algorithm = FedDpa(global_rank=2).for_federation(FEDERATION)
    state = started(algorithm, FEDERATION)
    only = {"client-0": CENTRES["client-0"]}
    state, _ = play(algorithm, FEDERATION, state, only, 1, STEPS, RATE)
    begun = algorithm.adapter_for(state, "client-1")
    state, _ = play(algorithm, FEDERATION, state, CENTRES, 2, STEPS, RATE)
    assert state.numbers["turns"].tolist() == [2, 1]
    expected = moved(SPLIT.trained(begun), SPLIT.trained(CENTRES["client-1"]))
    assert_close(SPLIT.trained(algorithm.adapter_for(state, "client-1")), expected)


def test_of_personal_halves_nothing_travels() -> None:
    for settings, ups, mark in (
        ({}, [GLOBAL, 0, GLOBAL, 0], MARK),
        ({"halves": "together"}, [GLOBAL] * 4, 0),
    ):
        algorithm = FedDpa(global_rank=2, **settings).for_federation(FEDERATION)
        state = started(algorithm, FEDERATION)
        for number, up in enumerate(ups, start=1):
            payload = algorithm.instruct(state, "client-0")
            assert isinstance(payload, PartlySent) and payload.num_bytes == GLOBAL + mark
            assert digest(payload.sent["global"]) == digest(state.adapters["*common"])
            state, sent = play(algorithm, FEDERATION, state, CENTRES, number)
            assert [reply.payload.num_bytes for reply in sent] == [up, up]
            assert GLOBAL < WHOLE


def test_together_every_step_trains_both_and_only_the_average_tells_them_apart() -> None:
    algorithm, state = after(1, halves="together")
    alone = {client: moved(start(RANK), CENTRES[client]) for client in names(2)}
    mean = weighted_sum([SPLIT.trained(alone[client]) for client in names(2)], [0.25, 0.75])
    for client in names(2):
        found = algorithm.adapter_for(state, client)
        assert digest(found) == digest(algorithm.instruct(state, client).tensors["adapter"])
        assert_close(SPLIT.trained(found), mean)
        assert_close(SPLIT.frozen(found), SPLIT.frozen(alone[client]))
        assert algorithm.begin(algorithm.instruct(state, client), None).hook is None


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_half_that_is_frozen_is_put_back_whatever_weight_decay_did(rounds: int) -> None:
    algorithm, state = after(rounds)
    payload = algorithm.instruct(state, "client-0")
    decayed = {name: 0.99 * tensor for name, tensor in CENTRES["client-0"].items()}
    answer, _ = algorithm.finish(payload, None, Trained(decayed, 10, 5, 1e-3))
    frozen, trained = (SPLIT.trained, SPLIT.frozen)[:: 1 if rounds else -1]
    assert digest(frozen(answer.tensors["adapter"])) == digest(frozen(payload.tensors["adapter"]))
    assert digest(trained(answer.tensors["adapter"])) == digest(trained(decayed))


@pytest.mark.parametrize(("rank", "global_rank"), [(1, 0), (4, 4), (4, 6)])
def test_a_rank_without_room_for_both_halves_is_refused(rank: int, global_rank: int) -> None:
    with pytest.raises(ConfigError, match=r"be global; both parts.*lower algorithm\.global_rank"):
        FedDpa(global_rank=global_rank).for_federation(context([rank] * 2))


def test_what_cannot_work_or_is_not_read_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"feddpa: client 'client-0' has rank 2"):
        FedDpa().for_federation(context([2, 4]))
    with pytest.raises(ConfigError, match=r"own_share = 0.3 is not read where halves = 'together'"):
        FedDpa(halves="together", own_share=0.3)
    kept = ["algorithm.name=feddpa", "local.optimizer_state=kept"]
    with pytest.raises((ConfigError, ValidationError), match="would move the one that is frozen"):
        load_config(overrides=kept)
    assert load_config(overrides=[*kept, "algorithm.halves=together"]).algorithm.name == "feddpa"
