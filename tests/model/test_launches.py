"""What a step asks of a GPU, counted on the meta device at the shape of a base of 1.3 billion.

No weight exists. A count says how many kernels eager PyTorch would start, and nothing of time.
"""

from __future__ import annotations

import pytest
import torch

from launches import CountLaunches, count_step, llama, shared_rows

MOST = 4_000
GROWTH = 1.05
BUDGET = 2**17  # one pass for 8 clients, and for 32


def test_launches_of_a_packed_step_do_not_grow_with_clients() -> None:
    base = llama()
    few, many = (count_step(base, shared_rows(clients), BUDGET).total for clients in (8, 32))
    assert few <= MOST
    assert many <= GROWTH * few


def test_clients_of_unlike_rank_take_no_more_launches() -> None:
    base = llama()
    alike, unlike = (
        count_step(base, shared_rows(8), BUDGET, ranks).total for ranks in ((16,), (4, 16, 9))
    )
    assert unlike == alike


def test_the_counter_counts_kernels_and_no_views() -> None:
    left, right = (torch.empty(4, 6, device="meta") for _ in range(2))
    with CountLaunches() as counted:
        whole = (left + right).mul_(2)  # two kernels
        whole.view(6, 4).T[1:].unsqueeze(0)
        torch.empty_like(whole)
        torch.ones(3) + 1  # on the CPU
    assert dict(counted.operators) == {"add": 1, "mul_": 1}


def test_a_loop_over_clients_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch takes, forward, two casts and two products; backward at least eight kernels more."""
    base = llama()
    monkeypatch.setattr("fedmira.model.lora.branch.products_grouped", lambda *_: False)
    few, many = (count_step(base, shared_rows(clients), BUDGET).total for clients in (2, 6))
    layers = 2 * base.model.config.num_hidden_layers
    assert many - few >= (6 - 2) * layers * 12
