"""FedRot-LoRA: rotations change no product, undo those of clients, and are none where aligned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedmira.adapters import Adapter, digest
from fedmira.errors import ConfigError
from fedmira.methods import FedAvg, FedRot, Method, ServerState
from fedmira.methods.fedrot import turned
from lora_federation import context, dense, lora, names, replies, started

RANK = 3


def rotation(seed: int) -> Tensor:
    """A random orthogonal matrix, of either determinant."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(RANK, RANK, generator=generator, dtype=torch.float64))[0]


def rotated(adapter: Adapter, seed: int) -> dict[str, Tensor]:
    """B Q and Q^T A, another Q for each module."""
    result = {}
    for place, name in enumerate(adapter):
        q = rotation(100 * seed + place // 2)  # the two factors of a module follow each other
        tensor = adapter[name].double()
        result[name] = (q.T @ tensor if ".lora_A." in name else tensor @ q).float()
    return result


def shared(algorithm: Method, reference: Adapter) -> ServerState:
    """The state in which `reference` is the shared adapter."""
    state = started(algorithm, algorithm.context)
    return ServerState({**state.adapters, "shared": reference}, state.numbers)


def assert_same_products(found: Adapter, expected: Adapter) -> None:
    for module, product in dense(expected).items():
        torch.testing.assert_close(dense(found)[module], product, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_no_product_changes_and_no_other_rotation_comes_nearer(seed: int, other: int) -> None:
    adapter, reference = lora(RANK, seed), lora(RANK, 7)
    found, angle = turned(adapter, reference)
    assert_same_products(found, adapter)
    assert 0 <= angle <= 2

    def far(each: Adapter, module: str) -> float:
        parts = (each[name] - reference[name] for name in each if f".{module}." in name)
        return float(sum(part.double().square().sum() for part in parts))

    for module in ("q_proj", "v_proj"):
        assert far(found, module) <= far(adapter, module) + 1e-4
        assert far(found, module) <= far(rotated(adapter, other), module) + 1e-4


@given(st.integers(0, 1000))
def test_clients_that_differ_by_a_rotation_average_to_their_common_product(seed: int) -> None:
    federation = context([RANK] * 3, [10, 30, 20])
    algorithm, learned = FedRot().for_federation(federation), lora(RANK, seed)
    adapters = {c: rotated(learned, seed + k) for k, c in enumerate(names(3))}
    state = shared(algorithm, lora(RANK, 7))
    combined = algorithm.combine(state, replies(federation, adapters, 2))
    assert_same_products(algorithm.adapter_for(combined.state, "client-0"), learned)
    assert set(combined.diagnostics.clients) == set(names(3))
    plain = FedAvg().for_federation(federation)
    averaged = plain.combine(shared(plain, lora(RANK, 7)), replies(federation, adapters, 2)).state
    lost = dense(plain.adapter_for(averaged, "client-0"))["m.q_proj"] - dense(learned)["m.q_proj"]
    assert float(lost.norm()) > 0.1, "factors as they are cancel each other"


def test_in_round_1_the_start_is_the_reference_and_b_of_zero_says_nothing() -> None:
    """From M = A_k A_0^T alone: a client that turned the start is turned back to it."""
    federation = context([RANK] * 2)
    algorithm = FedRot().for_federation(federation)
    state = started(algorithm, federation)
    start, learned = state.adapters["shared"], lora(RANK, 3)
    moved = {n: start[n] if ".lora_A." in n else learned[n] for n in start}
    adapters = {"client-0": moved, "client-1": rotated(moved, 5)}
    after = algorithm.combine(state, replies(federation, adapters)).state
    for name, tensor in algorithm.adapter_for(after, "client-0").items():
        torch.testing.assert_close(tensor, moved[name], rtol=1e-4, atol=1e-5)


def test_aligned_clients_are_averaged_as_by_fedavg() -> None:
    """B_k^T B_w + A_k A_w^T is symmetric and positive where both factors are multiples of w's."""
    federation = context([RANK] * 3, [10, 30, 20])
    reference = lora(RANK, 7)
    adapters = {
        c: {name: (1 + k) * tensor for name, tensor in reference.items()}
        for k, c in enumerate(names(3))
    }
    ends = []
    for settings in (FedRot(), FedAvg()):
        algorithm = settings.for_federation(federation)
        combined = algorithm.combine(shared(algorithm, reference), replies(federation, adapters, 2))
        ends.append(algorithm.adapter_for(combined.state, "client-0"))
        for figures in combined.diagnostics.clients.values():
            assert figures["turned"] < 1e-6
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-6, atol=1e-6)


def test_in_turns_round_1_is_fedavg_and_one_factor_decides_later() -> None:
    federation = context([RANK] * 2)
    algorithm = FedRot(aligned_by="turns").for_federation(federation)
    plain = FedAvg().for_federation(federation)
    reference = lora(RANK, 7)
    adapters = {c: rotated(lora(RANK, 3 + k), k) for k, c in enumerate(names(2))}

    def after(each: Method, number: int) -> Adapter:
        combined = each.combine(shared(each, reference), replies(federation, adapters, number))
        return each.adapter_for(combined.state, "client-0")

    assert digest(after(algorithm, 1)) == digest(after(plain, 1))
    for number, factor in ((2, "A"), (3, "B")):
        by_hand = [turned(adapter, reference, (factor,))[0] for adapter in adapters.values()]
        for name, tensor in after(algorithm, number).items():
            torch.testing.assert_close(tensor, (by_hand[0][name] + by_hand[1][name]) / 2)


def test_a_module_that_says_nothing_is_not_turned() -> None:
    adapter = lora(RANK, 3)
    silent = {name: torch.zeros_like(tensor) for name, tensor in adapter.items()}
    found, angle = turned(adapter, silent)
    assert angle == 0 and digest(found) == digest(adapter)


def test_different_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fedrot: client 'client-0' has rank 2"):
        FedRot().for_federation(context([2, 3]))
