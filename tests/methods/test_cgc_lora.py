"""CGC-LoRA: common experts are averaged by rows and gates, the own one stays, all are one LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedmira.adapters import Adapter, digest
from fedmira.errors import ConfigError
from fedmira.messages import Reply
from fedmira.methods import CgcLora, Local, Method, ServerState, Trained
from fedmira.methods.parts.learned_gates import fold, unfold
from fedmira.methods.parts.partly_sent import PartlySent
from fedmira.methods.parts.rank_split import RankSplit
from lora_federation import context, lora, names, play, start, started

RANK, RANKS = 8, [2, 1, 1, 4]
FEDERATION = context([RANK] * 2, [10, 30])
CENTRES = {client: lora(RANK, 7 + k) for k, client in enumerate(names(2))}
SPLIT = RankSplit(4)
COMMON = 4 * sum(tensor.numel() for tensor in lora(4, 0).values())


def after(rounds: int, method: Method) -> tuple[Method, ServerState]:
    algorithm = method.for_federation(FEDERATION)
    state = started(algorithm, FEDERATION)
    for number in range(1, rounds + 1):
        state, _ = learned_round(algorithm, state, number)
    return algorithm, state


def learned_round(
    algorithm: Method, state: ServerState, number: int
) -> tuple[ServerState, list[Reply]]:
    """Clients whose training ends at their centres, with gates of their own."""
    if isinstance(algorithm, Local):
        return play(algorithm, FEDERATION, state, CENTRES, number)
    sent = []
    for k, client in enumerate(names(2)):
        payload = algorithm.instruct(state, client)
        told = {f"gate {e}": gate for e, gate in enumerate(GATES[k])}
        trained = Trained(CENTRES[client], FEDERATION.rows[client], 3, 0.1, learned=told)
        answer, _ = algorithm.finish(payload, None, trained)
        sent.append(Reply(client, number, FEDERATION.rows[client], answer))
    return algorithm.combine(state, sent).state, sent


GATES = [[0.4, 0.1, 0.3, 0.2], [0.2, 0.2, 0.1, 0.5]]


def assert_close(found: Adapter, expected: Adapter) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def test_common_experts_are_averaged_by_rows_times_gates_and_own_ones_stay() -> None:
    algorithm, state = after(1, CgcLora())
    gates = [torch.tensor(each, dtype=torch.float64) for each in GATES]
    whole = [unfold(CENTRES[client], RANKS, gates[k]) for k, client in enumerate(names(2))]
    for e, place in enumerate((slice(0, 2), slice(2, 3), slice(3, 4))):
        weights = [10 * GATES[0][e], 30 * GATES[1][e]]
        for name, tensor in state.adapters["*common"].items():
            part = (place,) if ".lora_A." in name else (slice(None), place)
            mean = sum(w * each[name][part] for w, each in zip(weights, whole, strict=True))
            torch.testing.assert_close(tensor[part], mean / sum(weights), rtol=1e-4, atol=1e-5)
    for k, client in enumerate(names(2)):
        assert_close(state.adapters[client], SPLIT.frozen(whole[k]))
        assert state.numbers["gates"][k].tolist() == pytest.approx(GATES[k])
        joined = SPLIT.joined(state.adapters["*common"], state.adapters[client])
        assert_close(algorithm.adapter_for(state, client), fold(joined, RANKS, gates[k]))


def test_gates_begin_equal_sum_to_one_and_stand_in_the_log() -> None:
    algorithm = CgcLora().for_federation(FEDERATION)
    state = started(algorithm, FEDERATION)
    assert torch.equal(state.numbers["gates"], torch.full((2, 4), 0.25, dtype=torch.float64))
    sent = learned_round(algorithm, state, 1)[1]
    combined = algorithm.combine(state, sent)
    assert combined.state.numbers["gates"].sum(dim=1).tolist() == pytest.approx([1, 1])
    told = combined.diagnostics.clients["client-1"]
    assert told == pytest.approx({"gate_0": 0.2, "gate_1": 0.2, "gate_2": 0.1, "own_gate": 0.5})


def test_training_moves_the_gates_once_the_experts_say_anything() -> None:
    algorithm = CgcLora(gate_rate=0.2).for_federation(FEDERATION)
    state = started(algorithm, FEDERATION)
    for number in (1, 2):
        state, _ = play(algorithm, FEDERATION, state, CENTRES, number)
    gates = state.numbers["gates"]
    assert float((gates - 0.25).abs().max()) > 0.05
    assert digest(algorithm.adapter_for(state, "client-0")) != digest(
        algorithm.adapter_for(state, "client-1")
    )


def test_without_common_experts_it_is_local_training_bit_for_bit() -> None:
    (alone, state), (local, expected) = (
        after_play(method) for method in (CgcLora(common_experts=0), Local())
    )
    for client in names(2):
        found, other = alone.adapter_for(state, client), local.adapter_for(expected, client)
        assert digest(found) == digest(other)


def after_play(method: Method) -> tuple[Method, ServerState]:
    algorithm = method.for_federation(FEDERATION)
    state = started(algorithm, FEDERATION)
    for number in (1, 2):
        state, _ = play(algorithm, FEDERATION, state, CENTRES, number)
    return algorithm, state


def test_of_the_own_expert_and_its_gate_nothing_travels() -> None:
    algorithm, state = after(1, CgcLora())
    for payload in (
        algorithm.instruct(state, "client-0"),
        learned_round(algorithm, state, 2)[1][0].payload,
    ):
        assert isinstance(payload, PartlySent)
        assert list(payload.sent) == ["common"] and payload.num_bytes == COMMON + 3 * 8
        assert payload.scalars.keys() == {"gate 0", "gate 1", "gate 2"}
        assert {
            part.shape[1] for name, part in payload.sent["common"].items() if "_B." in name
        } == {4}


def test_all_experts_together_have_the_rank_of_the_adapter_whatever_it_is() -> None:
    for rank, settings in ((7, {"common_experts": 3}), (16, {}), (5, {"experts_rank": 4})):
        federation = context([rank] * 2)
        algorithm = CgcLora(**settings).for_federation(federation)
        whole = algorithm.adapter_for(started(algorithm, federation), "client-0")
        ranks = algorithm._ranks(whole)
        assert sum(ranks) == rank and len(ranks) == algorithm.common_experts + 1
        assert max(ranks[:-1]) - min(ranks[:-1]) <= 1
        assert digest(whole) == digest(start(rank))


def test_gates_that_another_machine_made_up_are_put_in_order() -> None:
    algorithm, state = after(1, CgcLora())
    sent = learned_round(algorithm, state, 2)[1]
    told = {"gate 0": 7.0, "gate 1": -3.0, "gate 2": 0.0}
    wild = Reply("client-0", 2, 10, PartlySent(sent[0].payload.tensors, told))
    after_it = algorithm.combine(state, [wild, sent[1]]).state
    gates = after_it.numbers["gates"][0]
    assert float(gates.sum()) == pytest.approx(1) and float(gates.min()) >= 1e-3 - 1e-12
    for client in names(2):
        found = algorithm.adapter_for(after_it, client)
        assert all(bool(torch.isfinite(part).all()) for part in found.values())


@pytest.mark.parametrize(
    ("rank", "settings", "told"),
    [
        (4, {}, "of rank 4, 2 directions are for 3 common experts and 2"),
        (8, {"experts_rank": 8}, "8 directions are for 3 common experts and 0"),
        (8, {"common_experts": 5}, "4 directions are for 5 common experts"),
    ],
)
def test_ranks_without_room_for_every_expert_are_refused(
    rank: int, settings: Any, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        CgcLora(**settings).for_federation(context([rank] * 2))


def test_settings_that_are_not_read_are_refused() -> None:
    for key, value in (("experts_rank", 4), ("gate_rate", 0.1)):
        with pytest.raises(ConfigError, match=f"{key} = {value:g} is not read"):
            CgcLora(common_experts=0, **{key: value})
