"""MTLoRA: one part is averaged, the own ones are never sent or aligned as MIRA aligns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedmira.adapters import Adapter, digest, map_tensors, weighted_sum
from fedmira.config import load_config
from fedmira.errors import ConfigError
from fedmira.methods import FedAvg, Local, Method, Mira, MtLora, ServerState
from fedmira.methods.parts.partly_sent import PartlySent
from fedmira.methods.parts.rank_split import RankSplit
from lora_federation import context, dense, lora, names, play, start, started

RANK, STEPS, RATE = 4, 3, 0.25
FEDERATION = context([RANK] * 3, [10, 30, 20])
CENTRES = {client: lora(RANK, 7 + k) for k, client in enumerate(names(3))}
SPLIT = RankSplit(2)
SHARED, WHOLE = (
    4 * sum(tensor.numel() for tensor in adapter.values())
    for adapter in (lora(2, 0), lora(RANK, 0))
)


def after(
    rounds: int, method: Method, only: tuple[str, ...] = names(3)
) -> tuple[Method, ServerState]:
    algorithm = method.for_federation(FEDERATION)
    state = started(algorithm, FEDERATION)
    for number in range(1, rounds + 1):
        there = {client: CENTRES[client] for client in only}
        state, _ = play(algorithm, FEDERATION, state, there, number, STEPS, RATE)
    return algorithm, state


def adapters_of(method: Method, rounds: int = 3) -> dict[str, str]:
    algorithm, state = after(rounds, method)
    return {client: digest(algorithm.adapter_for(state, client)) for client in names(3)}


def moved(begun: Adapter, centre: Adapter) -> Adapter:
    """Gradient descent on 1/2 |w - centre|^2 in closed form."""
    return map_tensors(lambda c, w: c + (1 - RATE) ** STEPS * (w - c), centre, begun)


def assert_close(found: Adapter, expected: Adapter) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_every_step_trains_both_parts_and_only_the_shared_one_is_averaged_by_rows() -> None:
    algorithm, state = after(1, MtLora())
    alone = {client: moved(start(RANK), CENTRES[client]) for client in names(3)}
    mean = weighted_sum(
        [SPLIT.trained(alone[client]) for client in names(3)], [1 / 6, 1 / 2, 1 / 3]
    )
    for client in names(3):
        found = algorithm.adapter_for(state, client)
        assert_close(SPLIT.trained(found), mean)
        assert_close(SPLIT.frozen(found), SPLIT.frozen(alone[client]))
        assert algorithm.begin(algorithm.instruct(state, client), None).hook is None


def test_the_product_of_an_adapter_is_the_sum_of_its_parts() -> None:
    algorithm, state = after(2, MtLora(shared_rank=1))
    for client in names(3):
        whole = dense(algorithm.adapter_for(state, client))
        shared, own = dense(state.adapters["*common"]), dense(state.adapters[client])
        for module, product in whole.items():
            torch.testing.assert_close(product, shared[module] + own[module])


def test_all_directions_shared_is_fedavg_and_none_is_local_bit_for_bit() -> None:
    assert adapters_of(MtLora(shared_rank=RANK)) == adapters_of(FedAvg())
    assert adapters_of(MtLora(shared_rank=0)) == adapters_of(Local())
    assert adapters_of(MtLora()) not in (adapters_of(FedAvg()), adapters_of(Local()))


@pytest.mark.parametrize("coupling", [0.3, 1.0])
def test_aligned_own_parts_with_nothing_shared_are_mira_bit_for_bit(coupling: float) -> None:
    aligned, mira = MtLora(shared_rank=0, own_coupling=coupling), Mira(coupling=coupling)
    assert adapters_of(aligned) == adapters_of(mira) != adapters_of(Local())


def test_own_parts_are_aligned_as_products_with_the_scale_of_the_whole() -> None:
    """One round: the shared part is that of no alignment, the own one MIRA's at the half rank."""
    algorithm, state = after(1, MtLora(own_coupling=0.8))
    _, still = after(1, MtLora())
    assert digest(state.adapters["*common"]) == digest(still.adapters["*common"])
    halves = context([2] * 3, [10, 30, 20])  # alpha / rank is twice what it is here, P is the same
    mira = Mira(coupling=0.8).for_federation(halves)
    own = {client: SPLIT.frozen(CENTRES[client]) for client in names(3)}
    begun = mira.initial_state({client: SPLIT.frozen(start(RANK)) for client in names(3)})
    expected, _ = play(mira, halves, begun, own, 1, STEPS, RATE)
    for client in names(3):
        found = dense(state.adapters[client])
        for module, product in dense(expected.adapters[client]).items():
            torch.testing.assert_close(found[module], product, rtol=1e-5, atol=1e-6)


def test_training_one_client_leaves_the_own_part_of_another_alone() -> None:
    algorithm, state = after(2, MtLora())
    later, _ = play(algorithm, FEDERATION, state, {"client-0": CENTRES["client-0"]}, 3)
    for client in names(3)[1:]:
        assert later.adapters[client] is state.adapters[client]
    assert digest(later.adapters["client-0"]) != digest(state.adapters["client-0"])


def test_own_parts_travel_only_to_be_aligned() -> None:
    for settings, size in (({}, SHARED), ({"own_coupling": 1.0}, WHOLE)):
        algorithm = MtLora(**settings).for_federation(FEDERATION)
        state = started(algorithm, FEDERATION)
        for number in (1, 2):
            payload = algorithm.instruct(state, "client-0")
            assert payload.num_bytes == size
            if isinstance(payload, PartlySent):
                assert digest(payload.sent["shared"]) == digest(state.adapters["*common"])
            state, sent = play(algorithm, FEDERATION, state, CENTRES, number)
            assert [reply.payload.num_bytes for reply in sent] == [size] * 3
            for reply in sent if not settings else ():
                part = reply.payload
                assert isinstance(part, PartlySent)
                assert digest(part.sent["shared"]) == digest(SPLIT.trained(part.tensors["adapter"]))
    assert 2 * SHARED == WHOLE


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"shared_rank": 5}, "shared_rank = 5, but adapters have rank 4; must be 4 or less"),
        ({"shared_rank": 4, "own_coupling": 0.5}, "all 4 directions are shared"),
    ],
)
def test_a_rank_that_does_not_hold_the_parts_is_refused(settings: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        MtLora(**settings).for_federation(FEDERATION)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="mtlora: client 'client-0' has rank 2"):
        MtLora().for_federation(context([2, 4]))
    with pytest.raises(ConfigError, match="a graph of 1 client|the graph of 1 client"):
        MtLora(own_coupling=1.0).for_federation(context([4]))
    MtLora().for_federation(context([4]))
    kept = ["algorithm.name=mtlora", "local.optimizer_state=kept"]
    assert load_config(overrides=kept).algorithm.name == "mtlora"
    with pytest.raises((ConfigError, ValidationError), match="aligned own parts get new factors"):
        load_config(overrides=[*kept, "algorithm.own_coupling=0.5"])
