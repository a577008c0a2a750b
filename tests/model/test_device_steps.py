"""A local step gives a device its work and never asks for a result.

PyTorch's meta device stands for one: its tensors have no numbers, so whatever needs a number
raises. The device's own speed, its kernels and copies from pageable memory need the device itself;
they are tested where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedmira.config import EngineSettings, LocalSettings
from fedmira.model import (
    BaseModel,
    LocalTask,
    LoraBranch,
    StackedAdapters,
    find_targets,
    response_losses,
    start_adapter,
    with_engine_options,
)
from fedmira.model.base.memory import PassLimit
from fedmira.model.packed.attention import attention_ways, layers_seen
from fedmira.model.training.steps import _Cohort
from launches import CountLaunches
from tiny import draw_rows, tiny_base

OPTIMIZERS = ["adamw", "adam", "sgd", "sophia", "zeroth-order"]
STEPS = 3
BUDGET = 60  # several passes in a step

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"
)


def cohort(base: BaseModel, optimizer: str, dropout: float = 0.0) -> _Cohort:
    """Three clients; the first has fewer steps than the others."""
    targets = find_targets(base.model, ())
    rows = draw_rows(12, 9, seed=5)
    tasks = [
        LocalTask(start_adapter(targets, 2 + i, i), 1.0, rows[: 4 * (i + 1)], i, squares=i != 1)
        for i in range(3)
    ]
    stacked = StackedAdapters(targets, [task.start for task in tasks], [1.0] * 3, base.device)
    branch = LoraBranch(
        base.model,
        stacked,
        dropout,
        [torch.Generator().manual_seed(i) for i in range(3)] if dropout else [],
    )
    settings = LocalSettings(optimizer=optimizer, epochs=1, batch_size=4, learning_rate=1e-3)  # type: ignore[arg-type]
    return _Cohort(
        branch, partial(response_losses, base, branch), tasks, settings, BUDGET, PassLimit()
    )


def steps_taken(moving: _Cohort) -> int:
    with moving.branch:
        return sum(1 for _ in iter(moving.step, False))


@pytest.fixture
def meta_base() -> Iterator[BaseModel]:
    base = tiny_base()
    assert base.packed
    base.model.to(torch.device("meta"), dtype=torch.bfloat16)
    yield base


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_waits_for_the_device(meta_base: BaseModel, optimizer: str) -> None:
    moving = cohort(meta_base, optimizer)
    assert steps_taken(moving) == STEPS
    assert moving.stacked.values.device.type == "meta"


@pytest.mark.parametrize("optimizer", ["adamw", "zeroth-order"])
def test_dropout_and_recomputed_layers_do_not_wait_either(
    meta_base: BaseModel, optimizer: str
) -> None:
    base = with_engine_options(
        meta_base, EngineSettings(recompute=True), find_targets(meta_base.model, ())
    )
    assert steps_taken(cohort(base, optimizer, dropout=0.1)) == STEPS


@pytest.mark.parametrize("way", ["joined", "copied", "rows"])
def test_nor_does_any_way_of_attention(meta_base: BaseModel, way: str) -> None:
    """PyTorch describes its CUDA kernel to the meta device, so its inputs are checked here.

    Its numbers are not.
    """
    if way not in attention_ways(meta_base.device, meta_base.dtype):
        pytest.skip("this torch has no such variable-length attention")
    with layers_seen() as seen:
        assert steps_taken(cohort(replace(meta_base, attention=way), "adamw")) == STEPS
    assert set(seen.values()) == {(False, way)}


def test_the_meta_device_notices_who_asks_for_a_number(
    meta_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other tests of this file rest on it."""
    moving = cohort(meta_base, "adamw")
    stop = moving._stop_the_failed

    def asking(good: Tensor) -> None:
        stop(good)
        bool(moving.alive.all())

    monkeypatch.setattr(moving, "_stop_the_failed", asking)
    with moving.branch, pytest.raises(RuntimeError, match="meta"):
        moving.step()


def test_kept_moments_are_sent_in_one_piece(meta_base: BaseModel) -> None:
    """Both moments and the counts of steps, however many layers and clients there are."""
    moving = cohort(meta_base, "adamw")
    moments = {name: torch.ones_like(part) for name, part in moving.tasks[1].start.items()}
    moving.tasks = [
        task if i != 1 else replace(task, moments=(moments, moments, 3))
        for i, task in enumerate(moving.tasks)
    ]
    with CountLaunches() as counted:
        assert moving._initial_moments().first.device.type == "meta"
    assert counted.total == 3


def test_kept_moments_are_fetched_in_one_piece() -> None:
    class Fetches(TorchFunctionMode):
        count = 0

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            self.count += func is Tensor.cpu
            return func(*args, **(kwargs or {}))

    moving = cohort(tiny_base(), "adamw")
    steps_taken(moving)
    with Fetches() as fetches:
        first, second, steps = moving._kept_moments(2)
    assert fetches.count == 2 and steps == STEPS
    for kept, matrix in ((first, moving.moments.first), (second, moving.moments.second)):
        views = moving.stacked.views(matrix, 2)
        assert all(torch.equal(kept[name], view) for name, view in views.items())


@needs_cuda
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_cuda_is_not_waited_for(optimizer: str) -> None:
    base = tiny_base()
    base.model.to(torch.device("cuda"), dtype=torch.bfloat16)
    moving = cohort(base, optimizer, dropout=0.1)
    with moving.branch:
        assert moving.step()  # allocates, and loads kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert moving.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("optimizer", ["adamw", "sophia", "zeroth-order"])
def test_cuda_gives_the_adapters_of_the_cpu(optimizer: str) -> None:
    base, there = tiny_base(), tiny_base()
    there.model.to(torch.device("cuda"))
    ours, theirs = cohort(base, optimizer), cohort(there, optimizer)
    assert steps_taken(ours) == steps_taken(theirs) == STEPS
    for own, other in zip(ours.outcomes(), theirs.outcomes(), strict=True):
        assert own.loss == pytest.approx(other.loss, rel=1e-4)
        assert all(
            torch.allclose(own.adapter[name], other.adapter[name], atol=2e-4)
            for name in own.adapter
        )
