"""HetLoRA: padding and cutting, weights by the size of the updates, hand-derived means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.adapters import digest, modules, truncate_rank
from fedmira.methods import HetLora
from fedmira.methods.hetlora import padded
from lora_federation import context, dense, lora, names, play, replies, start, started

SETTINGS = HetLora()


def test_padding_changes_no_update_and_cutting_takes_it_back() -> None:
    adapter = lora(3, 1)
    wide = padded(adapter, 7)
    assert digest(truncate_rank(wide, 3)) == digest(adapter)
    for name, matrix in dense(wide).items():
        torch.testing.assert_close(matrix, dense(adapter)[name])


def test_factors_are_averaged_by_norm_and_cut_to_each_rank() -> None:
    """The norm |B A| weighs a client, |3 * 1| = 3 and |diag(4, 0) + diag(0, 4)| = sqrt(32).

    Rows of data do not count.
    """
    federation = context([1, 2], [1000, 1])
    algorithm = SETTINGS.for_federation(federation)
    one = {
        "m.lora_A.weight": torch.tensor([[1.0, 0.0]]),
        "m.lora_B.weight": torch.tensor([[3.0], [0.0]]),
    }
    two = {"m.lora_A.weight": 2 * torch.eye(2), "m.lora_B.weight": 2 * torch.eye(2)}
    begin = {"m.lora_A.weight": torch.ones(2, 2), "m.lora_B.weight": torch.zeros(2, 2)}
    state = algorithm.initial_state({"client-0": truncate_rank(begin, 1), "client-1": begin})
    after = algorithm.combine(state, replies(federation, {"client-0": one, "client-1": two})).state
    first = 3 / (3 + 32**0.5)
    second = 1 - first
    expected = {
        "m.lora_A.weight": torch.tensor([[first + 2 * second, 0.0], [0.0, 2 * second]]),
        "m.lora_B.weight": torch.tensor([[3 * first + 2 * second, 0.0], [0.0, 2 * second]]),
    }
    for client, rank in federation.ranks.items():
        for name, found in algorithm.adapter_for(after, client).items():
            torch.testing.assert_close(found, truncate_rank(expected, rank)[name])


rounds_of_some = st.lists(
    st.sets(st.integers(0, 4), min_size=1).map(sorted), min_size=1, max_size=4
)
ranks_of_five = st.lists(st.integers(1, 6), min_size=5, max_size=5)


@settings(deadline=None, max_examples=30)
@given(ranks=ranks_of_five, rounds=rounds_of_some)
def test_directions_that_nobody_of_a_round_has_stay_as_they_are(
    ranks: list[int], rounds: list[list[int]]
) -> None:
    """Directions of some clients are the mean of padded factors, in float64.

    The weights are those of the norms.
    """
    federation = context(ranks)
    algorithm = SETTINGS.for_federation(federation)
    largest, state = max(ranks), started(algorithm, federation)
    strongest = federation.clients[ranks.index(largest)]
    for number, members in enumerate(rounds, start=1):
        before = algorithm.adapter_for(state, strongest)
        centres = {f"client-{k}": lora(ranks[k], 10 * number + k) for k in members}
        state, sent = play(algorithm, federation, state, centres, number)
        norms = [
            sum(
                float(part.square().sum())
                for part in dense(reply.payload.tensors["adapter"]).values()
            )
            ** 0.5
            for reply in sent
        ]
        widest = max(ranks[k] for k in members)
        wide = [padded(reply.payload.tensors["adapter"], largest) for reply in sent]
        for name, found in algorithm.adapter_for(state, strongest).items():
            mean = sum(
                norm / sum(norms) * adapter[name].double()
                for norm, adapter in zip(norms, wide, strict=True)
            )
            mean, old = (
                part if ".lora_A." in name else part.T for part in (mean, before[name].double())
            )
            expected = torch.cat([mean[:widest], old[widest:]])
            torch.testing.assert_close(
                found if ".lora_A." in name else found.T, expected.float(), rtol=1e-5, atol=1e-6
            )
        for down, _ in modules(algorithm.adapter_for(state, strongest)).values():
            assert bool((down.norm(dim=1) > 0).all()), (
                "a direction with A = B = 0 never gets a gradient again"
            )


def test_a_client_of_a_high_rank_finds_all_its_directions_alive_after_rounds_without_it() -> None:
    """Its own update of round 1 is still there.

    Beside what the others of rank 2 made of the first two directions.
    """
    federation = context([2, 2, 6])
    algorithm = SETTINGS.for_federation(federation)
    state, _ = play(
        algorithm, federation, started(algorithm, federation), {"client-2": lora(6, 1)}, 1
    )
    kept = {
        name: tensor[2:] if ".lora_A." in name else tensor[:, 2:]
        for name, tensor in algorithm.adapter_for(state, "client-2").items()
    }
    for number in (2, 3):
        state, _ = play(
            algorithm,
            federation,
            state,
            {client: lora(2, 7 * number) for client in names(2)},
            number,
        )
    given = algorithm.adapter_for(state, "client-2")
    for name, tensor in given.items():
        assert torch.equal(tensor[2:] if ".lora_A." in name else tensor[:, 2:], kept[name])
    for down, up in modules(given).values():
        assert bool((down.norm(dim=1) > 0).all() and (up.norm(dim=0) > 0).all())


def test_directions_reached_by_updates_of_zero_alone_stay_as_they_are() -> None:
    """Such a reply has weight 0, so what it has more than the others is as good as absent."""
    federation = context([2, 4])
    algorithm = SETTINGS.for_federation(federation)
    state = started(algorithm, federation)
    after = algorithm.combine(
        state, replies(federation, {"client-0": lora(2, 1), "client-1": start(4)})
    ).state
    for name, found in algorithm.adapter_for(after, "client-1").items():
        moved, still = (
            (found[:2], found[2:]) if ".lora_A." in name else (found[:, :2], found[:, 2:])
        )
        torch.testing.assert_close(moved, lora(2, 1)[name])
        assert torch.equal(
            still, start(4)[name][2:] if ".lora_A." in name else start(4)[name][:, 2:]
        )


def test_when_nobody_moved_the_weights_are_equal_and_finite() -> None:
    federation = context([3, 3, 3])
    algorithm = SETTINGS.for_federation(federation)
    idle = dict.fromkeys(federation.clients, start(3))
    after = algorithm.combine(started(algorithm, federation), replies(federation, idle)).state
    for name, found in algorithm.adapter_for(after, "client-0").items():
        torch.testing.assert_close(found, start(3)[name])


def test_a_client_sends_and_gets_its_own_rank() -> None:
    federation = context([2, 5])
    algorithm = SETTINGS.for_federation(federation)
    state = started(algorithm, federation)
    few, many = (algorithm.instruct(state, client).num_bytes for client in federation.clients)
    assert few / many == pytest.approx(2 / 5)
