"""Gates in front of experts: folded and unfolded again, and their slopes by differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmira.adapters import Adapter
from fedmira.methods.parts.learned_gates import (
    LEAST,
    LearnedGates,
    fold,
    gate_slopes,
    proper,
    unfold,
)
from lora_federation import dense, descend, lora

RANKS = [2, 1, 3]
RANK = sum(RANKS)
OWNER = torch.tensor([0, 0, 1, 2, 2, 2])


def expert(adapter: Adapter, number: int) -> Adapter:
    """The factors of one expert."""
    place = slice(sum(RANKS[:number]), sum(RANKS[: number + 1]))
    return {
        name: part[place] if ".lora_A." in name else part[:, place]
        for name, part in adapter.items()
    }


@pytest.mark.parametrize("number", range(3))
def test_a_gate_that_takes_all_is_plain_lora_of_that_expert(number: int) -> None:
    logits = torch.zeros(3, dtype=torch.float64)
    logits[number] = 200.0
    experts = lora(RANK, 4)
    folded = fold(experts, RANKS, torch.softmax(logits, dim=0))
    for module, product in dense(expert(experts, number)).items():
        torch.testing.assert_close(dense(folded)[module], product)


def test_a_folded_adapter_is_the_weighted_sum_of_the_experts_products() -> None:
    experts, gates = lora(RANK, 4), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    parts = [dense(expert(experts, number)) for number in range(3)]
    for module, product in dense(fold(experts, RANKS, gates)).items():
        expected = sum(
            (float(gate) * part[module] for gate, part in zip(gates, parts, strict=True)),
            torch.zeros_like(product),
        )
        torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-6)
    for name, tensor in unfold(fold(experts, RANKS, gates), RANKS, gates).items():
        torch.testing.assert_close(tensor, experts[name])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-2, 3), min_size=1, max_size=6))
def test_proper_gates_have_sum_one_and_none_is_lost(given_gates: list[float]) -> None:
    gates = proper(torch.tensor(given_gates, dtype=torch.float64))
    assert float(gates.sum()) == pytest.approx(1)
    assert float(gates.min()) >= LEAST - 1e-12
    torch.testing.assert_close(proper(gates), gates)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**20))
def test_slopes_of_gates_are_those_of_the_loss_by_differences(seed: int) -> None:
    experts = {name: part.double() for name, part in lora(RANK, seed).items()}
    logits = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    goal = {name: part.double() for name, part in lora(RANK, seed + 1).items()}

    def folded_up(name: str, place: Tensor) -> Tensor:
        return experts[name] * torch.softmax(place, dim=0)[OWNER][None, :]

    def loss(place: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for name in experts:
            if ".lora_B." in name:
                down = name.replace("lora_B", "lora_A")
                product = folded_up(name, place) @ experts[down]
                total = total + (product - goal[name] @ goal[down]).square().sum()
        return total

    along = torch.zeros(RANK, dtype=torch.float64)
    for name in experts:
        if ".lora_B." in name:
            down, up = name.replace("lora_B", "lora_A"), folded_up(name, logits)
            slope = 2 * (up @ experts[down] - goal[name] @ goal[down]) @ experts[down].T
            along += (slope * experts[name]).sum(dim=0)
    found = gate_slopes(along, OWNER, torch.softmax(logits, dim=0))
    for number in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[number] = 1e-5
        expected = float(loss(logits + step) - loss(logits - step)) / 2e-5
        assert float(found[number]) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_training_steps_the_experts_own_factors_and_the_gates_beside_them() -> None:
    """Against torch on A, B and z apart: SGD for the factors, Adam for z."""
    steps, rate, gate_rate = 6, 0.1, 0.05
    experts, centre = lora(RANK, 4), lora(RANK, 5)
    gates = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    start = LearnedGates(fold(experts, RANKS, gates), RANKS, gates, gate_rate).start()
    found = descend(start, centre, steps, rate)

    own = {name: part.clone().requires_grad_() for name, part in experts.items()}
    place = gates.log().float().requires_grad_()
    factors = torch.optim.SGD(own.values(), lr=rate)
    logits = torch.optim.Adam([place], lr=gate_rate)

    def folded() -> Adapter:
        scales = torch.softmax(place, dim=0)[OWNER]
        return {
            name: part * scales[None, :] if ".lora_B." in name else part
            for name, part in own.items()
        }

    for _ in range(steps):
        factors.zero_grad(), logits.zero_grad()
        sum((part - centre[name]).square().sum() / 2 for name, part in folded().items()).backward()  # type: ignore[union-attr]
        factors.step(), logits.step()
    for name, part in folded().items():
        torch.testing.assert_close(found[name], part.detach(), rtol=1e-4, atol=1e-5)
    assert start.learned is not None
    learned = list(start.learned().values())
    assert learned == pytest.approx(torch.softmax(place.detach(), dim=0).tolist(), rel=1e-4)
    assert learned != pytest.approx(gates.tolist(), abs=1e-3) and sum(learned) == pytest.approx(1)
