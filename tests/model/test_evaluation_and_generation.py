"""Losses and generation with many clients' adapters at once equal one client at a time.

The one is plain PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from fedmira.adapters import Adapter
from fedmira.model import (
    BaseModel,
    LoraBranch,
    StackedAdapters,
    TargetModule,
    find_targets,
    read_adapter,
    response_losses,
    start_adapter,
    write_adapter,
)
from fedmira.model.kinds.peft_files import lora_config
from tiny import ARCHITECTURES, TinyRow, draw_rows, tiny_base, tiny_model

ALPHA = 8.0


def noisy(targets: Sequence[TargetModule], rank: int, seed: int) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in start_adapter(targets, rank, seed).items()
    }


def plain_peft(
    architecture: str,
    base: BaseModel,
    targets: Sequence[TargetModule],
    adapter: Adapter,
    rank: int,
    folder: Path,
) -> PeftModel:
    write_adapter(folder, adapter, lora_config(base, targets, rank, ALPHA, 0.0))
    return PeftModel.from_pretrained(tiny_model(architecture), folder).eval()


def padded_loss(model: PeftModel, row: TinyRow) -> float:
    ids = torch.tensor([[*row.prompt, *row.response]])
    labels = torch.tensor([[-100] * len(row.prompt) + list(row.response)])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss) * len(row.response)


def losses_of(
    base: BaseModel,
    branch: LoraBranch,
    batches: Sequence[tuple[int, Sequence[TinyRow]]],
    budget: int,
) -> torch.Tensor:
    totals = torch.zeros(len(batches), dtype=torch.float64)
    with torch.no_grad(), branch:
        for losses in response_losses(base, branch, batches, budget):
            totals.index_add_(0, losses.clients, losses.values.double())
    return totals


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_saved_adapters_give_the_same_loss_with_plain_peft(
    architecture: str, tmp_path: Path
) -> None:
    base = tiny_base(architecture)
    targets = find_targets(base.model, ())
    ranks = (4, 2)
    adapters = [noisy(targets, rank, rank) for rank in ranks]
    rows = [draw_rows(6, 10, 1), draw_rows(4, 0, 2)]
    branch = LoraBranch(
        base.model,
        StackedAdapters(targets, adapters, [ALPHA / rank for rank in ranks], base.device),
    )
    found = losses_of(base, branch, [(0, rows[0]), (1, rows[1])], 120)
    for client, (adapter, rank) in enumerate(zip(adapters, ranks, strict=True)):
        model = plain_peft(architecture, base, targets, adapter, rank, tmp_path / str(client))
        assert float(found[client]) == pytest.approx(
            sum(padded_loss(model, row) for row in rows[client]), rel=2e-5
        )
        assert all(
            torch.equal(tensor, adapter[name])
            for name, tensor in read_adapter(tmp_path / str(client)).items()
        )


@pytest.mark.parametrize("budget", [1, 64, 10_000])
def test_the_loss_does_not_depend_on_how_rows_are_batched(budget: int) -> None:
    base = tiny_base()
    targets = find_targets(base.model, ())
    stacked = StackedAdapters(targets, [noisy(targets, 4, 1)], [2.0], base.device)
    rows = draw_rows(8, 12, 3)
    one_by_one = sum(
        float(losses_of(base, LoraBranch(base.model, stacked), [(0, [row])], 10_000)[0])
        for row in rows
    )
    assert float(
        losses_of(base, LoraBranch(base.model, stacked), [(0, rows)], budget)[0]
    ) == pytest.approx(one_by_one, rel=1e-5)


def test_hooks_leave_no_trace_on_the_base() -> None:
    base = tiny_base()
    targets = find_targets(base.model, ())
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        before = base.model(input_ids=ids).logits
        branch = LoraBranch(
            base.model, StackedAdapters(targets, [noisy(targets, 4, 1)], [2.0], base.device)
        )
        losses_of(base, branch, [(0, draw_rows(3, 4, 1))], 100)
        assert torch.equal(base.model(input_ids=ids).logits, before)
    assert base.model.config._attn_implementation == "sdpa"
