"""Sums of squared gradients against autograd through plain PEFT, before hooks and clipping."""

from __future__ import annotations

from collections.abc import Sequence

import peft
import torch

from fedmira.adapters import Adapter, digest, map_tensors
from fedmira.config import LocalSettings
from fedmira.model import LocalTask, find_targets, start_adapter, train_cohort
from fedmira.model.training.batches import batch_indices
from tiny import TinyRow, draw_rows, tiny_base, tiny_model

ALPHA, RANK = 16.0, 4
STILL = 1e-20  # of a step of SGD: parameters stay as they are, to the bit


def moved_start(targets: Sequence[object], seed: int) -> Adapter:
    """With B that is not zero, so that A has a gradient too."""
    generator = torch.Generator().manual_seed(seed)
    begun = start_adapter(targets, RANK, seed)  # type: ignore[arg-type]
    return {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in begun.items()
    }


def gradient_of(adapter: Adapter, batch: Sequence[TinyRow]) -> Adapter:
    """Of the mean loss per response token, with PEFT and one row at a time."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    peft.set_peft_model_state_dict(model, dict(adapter))
    tokens = sum(len(row.response) for row in batch)
    for row in batch:
        ids = torch.tensor([[*row.prompt, *row.response]])
        labels = ids.clone()
        labels[:, : len(row.prompt)] = -100
        (model(input_ids=ids, labels=labels).loss * len(row.response) / tokens).backward()
    return {
        name.replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def job(
    targets: Sequence[object], rows: Sequence[TinyRow], seed: int = 3, **more: object
) -> LocalTask:
    return LocalTask(moved_start(targets, seed), ALPHA / RANK, rows, seed, squares=True, **more)  # type: ignore[arg-type]


def assert_close(found: Adapter | None, expected: Adapter) -> None:
    assert found is not None and found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().max())
        torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=1e-4 * scale)


def test_one_full_batch_is_the_squared_gradient_whatever_is_clipped_or_added() -> None:
    base = tiny_base()
    targets, rows = find_targets(base.model, ()), draw_rows(5, 4, 1)
    settings = LocalSettings(
        optimizer="sgd", steps=1, batch_size=5, learning_rate=0.1, max_grad_norm=1e-3
    )
    task = job(targets, rows, hook=lambda gradient, adapter: map_tensors(torch.ones_like, gradient))
    (outcome,) = train_cohort(base, targets, [task], settings, 0.0, 400)
    assert not outcome.failure and digest(outcome.adapter) != digest(task.start)
    expected = map_tensors(torch.square, gradient_of(task.start, rows))
    assert all(bool(tensor.any()) for tensor in expected.values())
    assert_close(outcome.squares, expected)


def test_batches_count_by_their_share_of_the_rows_and_clients_stay_apart() -> None:
    base = tiny_base()
    targets = find_targets(base.model, ())
    settings = LocalSettings(optimizer="sgd", epochs=1, batch_size=4, learning_rate=STILL)
    tasks = [job(targets, draw_rows(6, 4, 1), 3), job(targets, draw_rows(9, 2, 2), 5)]
    silent = LocalTask(moved_start(targets, 9), ALPHA / RANK, draw_rows(4, 0, 4), 9)
    outcomes = train_cohort(base, targets, [*tasks, silent], settings, 0.0, 120)
    for task, outcome in zip(tasks, outcomes, strict=False):
        expected = map_tensors(torch.zeros_like, task.start)
        for chosen in batch_indices(len(task.rows), settings, task.seed):
            gradient = gradient_of(task.start, [task.rows[i] for i in chosen])  # type: ignore[misc]
            share = len(chosen) / len(task.rows)
            expected = map_tensors(lambda s, g, w=share: s + w * g.square(), expected, gradient)
        assert digest(outcome.adapter) == digest(task.start)
        assert_close(outcome.squares, expected)
    assert outcomes[2].squares is None


def test_asking_for_squares_changes_no_bit_of_training() -> None:
    base = tiny_base()
    targets, rows = find_targets(base.model, ()), draw_rows(6, 4, 1)
    settings = LocalSettings(steps=3, batch_size=2)
    asked = job(targets, rows)
    plain = LocalTask(asked.start, asked.scale, rows, asked.seed)
    (first,), (second,) = (
        train_cohort(base, targets, [task], settings, 0.0, 400) for task in (asked, plain)
    )
    assert digest(first.adapter) == digest(second.adapter) and second.squares is None
