"""LoRA-FAIR: the corrected B against dense least squares, and its two limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.adapters import Adapter, digest, modules
from fedmira.errors import ConfigError
from fedmira.methods import FedAvg, LoraFair
from lora_federation import context, dense, lora, names, replies, start, started

ROWS = [10, 30, 20]
RANK = 4
FEDERATION = context([RANK] * 3, ROWS)
CLIENTS = {client: lora(RANK, 50 + k) for k, client in enumerate(names(3))}


def averaged(algorithm: FedAvg, adapters: dict[str, dict[str, torch.Tensor]]) -> Adapter:
    bound = algorithm.for_federation(FEDERATION)
    state = bound.combine(started(bound, FEDERATION), replies(FEDERATION, adapters)).state
    return bound.adapter_for(state, "client-0")


def mean_product(module: str) -> torch.Tensor:
    terms = [rows / 60 * dense(CLIENTS[c])[module] for c, rows in zip(CLIENTS, ROWS, strict=True)]
    return torch.stack(terms).sum(dim=0)


@settings(max_examples=12)
@given(st.floats(min_value=-8, max_value=3))
def test_the_correction_is_the_dense_minimiser_of_the_residual_and_the_penalty(
    exponent: float,
) -> None:
    """|R - D A|^2 + lambda |D|^2 is least squares on [A  sqrt(lambda) I]."""
    penalty = 10.0**exponent
    found = modules(averaged(LoraFair(correction_penalty=penalty), CLIENTS))
    for module, (down, up) in modules(averaged(FedAvg(), CLIENTS)).items():
        assert torch.equal(found[module][0], down), "A is the mean"
        down, up = down.double(), up.double()
        residual = mean_product(module) - up @ down
        wide = torch.cat([down, penalty**0.5 * torch.eye(RANK, dtype=torch.float64)], dim=1)
        aim = torch.cat([residual, torch.zeros(len(up), RANK, dtype=torch.float64)], dim=1)
        correction = torch.linalg.lstsq(wide.T, aim.T).solution.T
        torch.testing.assert_close(found[module][1].double(), up + correction, rtol=1e-5, atol=1e-5)


def test_a_small_penalty_leaves_nothing_of_the_residual_in_the_row_space_of_a() -> None:
    for penalty, left in ((1e-10, 1e-5), (1e-3, 1e-2)):
        found = averaged(LoraFair(correction_penalty=penalty), CLIENTS)
        plain = modules(averaged(FedAvg(), CLIENTS))
        for module, (down, up) in modules(found).items():
            rows = torch.linalg.qr(down.double().T).Q  # an orthonormal basis of A's row space
            before = mean_product(module) - plain[module][1].double() @ down.double()
            after = mean_product(module) - up.double() @ down.double()
            assert float((after @ rows).norm()) < left * float((before @ rows).norm())
            assert float(after.norm()) < float(before.norm())


def test_a_large_penalty_corrects_nothing() -> None:
    huge = averaged(LoraFair(correction_penalty=1e30), CLIENTS)
    assert digest(huge) == digest(averaged(FedAvg(), CLIENTS))


def test_equal_clients_are_averaged_as_by_fedavg_bit_for_bit() -> None:
    same = dict.fromkeys(names(3), CLIENTS["client-0"])
    assert digest(averaged(LoraFair(), same)) == digest(averaged(FedAvg(), same))


def test_clients_with_one_a_need_no_correction() -> None:
    """Then the mean of the factors has the mean of the products."""
    common = {name: tensor for name, tensor in lora(RANK, 9).items() if ".lora_A." in name}
    frozen = {client: {**adapter, **common} for client, adapter in CLIENTS.items()}
    found, plain = averaged(LoraFair(), frozen), averaged(FedAvg(), frozen)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-6, atol=1e-6)


def test_an_a_of_zeros_is_no_division_by_zero() -> None:
    nothing = {
        name: torch.zeros_like(tensor) if ".lora_A." in name else tensor
        for name, tensor in CLIENTS["client-0"].items()
    }
    found = averaged(LoraFair(), dict.fromkeys(names(3), nothing))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())


def test_truncation_is_the_norm_of_what_the_corrected_adapter_misses() -> None:
    algorithm = LoraFair().for_federation(FEDERATION)
    combined = algorithm.combine(started(algorithm, FEDERATION), replies(FEDERATION, CLIENTS))
    scale = 16 / RANK
    squares = sum(
        float((scale * (mean_product(module) - product)).square().sum())
        for module, product in dense(algorithm.adapter_for(combined.state, "client-0")).items()
    )
    assert squares > 0.01
    assert combined.diagnostics.round["truncation"] == pytest.approx(squares**0.5, rel=1e-6)


def test_absent_clients_are_left_out_and_a_single_one_is_kept_as_it_is() -> None:
    alone = {"client-1": CLIENTS["client-1"]}
    assert digest(averaged(LoraFair(), alone)) == digest(CLIENTS["client-1"])
    assert digest(averaged(LoraFair(), {"client-1": start(RANK)})) == digest(start(RANK))


def test_different_ranks_and_a_penalty_of_zero_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora-fair: client 'client-0' has rank 2"):
        LoraFair().for_federation(context([2, 3]))
    with pytest.raises(ConfigError, match=r"correction_penalty = 0.*greater than 0"):
        LoraFair(correction_penalty=0)
