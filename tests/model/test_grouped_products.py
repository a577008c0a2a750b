"""Grouped products give what a loop over the clients gives: values, gradients, and whole steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmira.adapters import Adapter
from fedmira.config import LocalSettings
from fedmira.model import (
    LocalTask,
    LoraBranch,
    StackedAdapters,
    find_targets,
    response_losses,
    start_adapter,
)
from fedmira.model.base.memory import PassLimit
from fedmira.model.base.types import TargetModule
from fedmira.model.lora import branch as branches
from fedmira.model.lora import grouped as products
from fedmira.model.lora.grouped import products_grouped
from fedmira.model.training.steps import _Cohort
from tiny import draw_rows, tiny_base

CPU = torch.device("cpu")


class OneLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs).requires_grad_(False)


def noisy(targets: Sequence[TargetModule], rank: int, seed: int) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=draw) * 0.1
        for name, tensor in start_adapter(targets, rank, seed).items()
    }


def one_pass(
    model: OneLayer, ranks: Sequence[int], owners: Sequence[tuple[int, slice]], grouped: bool
) -> tuple[Tensor, Tensor, list[Adapter]]:
    """What the layer gives, the gradient of its input, and each client's gradient."""
    inputs, outputs = model.layer.in_features, model.layer.out_features
    targets = [TargetModule("layer", inputs, outputs, False)]
    stacked = StackedAdapters(
        targets,
        [noisy(targets, rank, k) for k, rank in enumerate(ranks)],
        [0.5 + k for k in range(len(ranks))],
        CPU,
        multiple=8,
    )
    tokens = max(part.stop for _, part in owners)
    draw = torch.Generator().manual_seed(tokens)
    row = torch.randn(1, tokens, inputs, generator=draw, requires_grad=True)
    weight = torch.randn(1, tokens, outputs, generator=draw)
    with LoraBranch(model, stacked, grouped=grouped) as branch, branch.tokens(owners):
        result = model.layer(row)
        (result * weight).sum().backward()
    assert row.grad is not None
    gradients = [stacked.views(stacked.gradients, k) for k in range(len(ranks))]
    assert sum(part.abs().sum() for each in gradients for part in each.values()) == pytest.approx(
        float(stacked.gradients.abs().sum()), rel=1e-5
    )  # none falls on the padding
    return result.detach(), row.grad, gradients


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 20), min_size=2, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=2, max_size=6),
)
def test_values_and_gradients_are_those_of_a_loop(
    ranks: list[int], parts: list[tuple[int, int]]
) -> None:
    """Clients in any order, some twice, some without a token, some not in the pass."""
    owners, start = [], 0
    for client, size in [*parts, (0, 1)]:
        owners.append((client % len(ranks), slice(start, start + size)))
        start += size
    torch.manual_seed(0)
    model = OneLayer(16, 24)
    looped, grouped = (one_pass(model, ranks, owners, way) for way in (False, True))
    assert torch.allclose(looped[0], grouped[0], atol=1e-5)
    assert torch.allclose(looped[1], grouped[1], atol=1e-5)
    for own, other in zip(looped[2], grouped[2], strict=True):
        assert all(torch.allclose(own[name], other[name], atol=1e-4) for name in own)


def test_layers_whose_sizes_the_kernels_cannot_read_are_looped_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[tuple[str, str]] = []
    real = branches.add_grouped

    def noted(factors: object, names: tuple[str, str], *rest: object) -> Tensor:
        used.append(names)
        return real(factors, names, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(branches, "add_grouped", noted)
    owners = [(0, slice(0, 3)), (1, slice(3, 5))]
    for sizes in ((12, 16), (16, 12)):
        one_pass(OneLayer(*sizes), (2, 3), owners, grouped=True)
    assert not used
    one_pass(OneLayer(16, 8), (2, 3), owners, grouped=True)
    assert len(used) == 1


def adapters_after_steps(grouped: bool, optimizer: str, dropout: float) -> list[Adapter]:
    """Three clients of unlike rank and scale; the first ends before the others."""
    base = tiny_base()
    targets = find_targets(base.model, ())
    rows = draw_rows(12, 9, seed=5)
    tasks = [
        LocalTask(noisy(targets, 2 + 3 * i, i), 1.0 + i, rows[: 4 * (i + 1)], i) for i in range(3)
    ]
    stacked = StackedAdapters(
        targets, [task.start for task in tasks], [task.scale for task in tasks], CPU, multiple=8
    )
    generators = [torch.Generator().manual_seed(i) for i in range(3)] if dropout else []
    branch = LoraBranch(base.model, stacked, dropout, generators, grouped=grouped)
    moving = _Cohort(
        branch,
        partial(response_losses, base, branch),
        tasks,
        LocalSettings(optimizer=optimizer, epochs=1, batch_size=4, learning_rate=1e-2),  # type: ignore[arg-type]
        60,
        PassLimit(),
    )
    with branch:
        while moving.step():
            pass
    return [outcome.adapter for outcome in moving.outcomes()]


@pytest.mark.parametrize(
    ("optimizer", "dropout"),
    [("sgd", 0.0), ("sgd", 0.2), ("adamw", 0.0), ("sophia", 0.0), ("zeroth-order", 0.0)],
)
def test_whole_steps_leave_the_same_adapters(optimizer: str, dropout: float) -> None:
    """Values change in place between the passes of a step, too, where slopes are measured."""
    looped, grouped = (adapters_after_steps(way, optimizer, dropout) for way in (False, True))
    for own, other in zip(looped, grouped, strict=True):
        assert all(torch.allclose(own[name], other[name], atol=1e-5) for name in own)


def test_in_bfloat16_gradients_differ_by_rounding_alone() -> None:
    """A pass's part is rounded once, to a part in 2^9 of itself, before it is summed."""
    found = {}
    for grouped in (False, True):
        base = tiny_base()
        base.model.to(dtype=torch.bfloat16)
        targets = find_targets(base.model, ())
        stacked = StackedAdapters(
            targets, [noisy(targets, 3 + k, k) for k in range(2)], [2.0, 0.7], CPU, multiple=8
        )
        batches = [(k, draw_rows(4, 9, seed=k)) for k in range(2)]
        with LoraBranch(base.model, stacked, grouped=grouped) as branch:
            for losses in response_losses(base, branch, batches, 200):
                losses.values.sum().backward()
        found[grouped] = stacked.gradients
    assert not torch.equal(found[True], found[False])
    assert (found[True] - found[False]).norm() <= 0.02 * found[False].norm()


def test_a_cpu_loops_over_clients() -> None:
    assert not products_grouped(CPU, torch.bfloat16)
    targets = [TargetModule("layer", 16, 24, False)]
    stacked = StackedAdapters(targets, [start_adapter(targets, 3, 0)], [1.0], CPU)
    assert stacked.values.numel() == 3 * (16 + 24)  # nothing is padded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_number_types_than_bfloat16_are_not_grouped(dtype: torch.dtype) -> None:
    assert not products_grouped(torch.device("meta"), dtype)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"
)
def test_cuda_has_grouped_products_that_agree() -> None:
    assert products_grouped(torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_tells_wrong_products_from_right_ones(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert products._trial(CPU, dtype)
    right = products._product
    assert right is not None

    def late(left: Tensor, other: Tensor, offs: Tensor) -> Tensor:
        """Groups that end one place too early."""
        return right(left, other, offs=offs - 1)

    monkeypatch.setattr(products, "_product", late)
    assert not products._trial(CPU, dtype)
