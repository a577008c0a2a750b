"""Cohort training equals plain PEFT training of each client alone, and keeps clients apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import peft
import pytest
import torch

from fedmira.adapters import Adapter
from fedmira.config import LocalSettings
from fedmira.model import (
    LocalOutcome,
    LocalTask,
    find_targets,
    start_adapter,
    train_cohort,
)
from fedmira.model.training.batches import batch_indices
from tiny import ARCHITECTURES, TinyRow, draw_rows, tiny_base, tiny_model

TOLERANCE = 5e-5  # float32: after 5 Adam steps of 5e-3, the largest difference of any adapter entry
TARGETS = {"gpt2": ("c_attn", "c_proj")}
ALPHA = 16.0


def task(
    base_targets: Sequence[object],
    rows: Sequence[TinyRow],
    rank: int = 4,
    seed: int = 7,
    **more: object,
) -> LocalTask:
    return LocalTask(start_adapter(base_targets, rank, 11), ALPHA / rank, rows, seed, **more)  # type: ignore[arg-type]


def with_peft(
    architecture: str, targets: tuple[str, ...], job: LocalTask, rank: int, settings: LocalSettings
) -> Adapter:
    """The same client alone: peft model, padded batch, Hugging Face loss, torch optimizer."""
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        target_modules=list(targets),
        fan_in_fan_out=architecture == "gpt2",
    )
    model = peft.get_peft_model(tiny_model(architecture), config).eval()
    peft.set_peft_model_state_dict(model, dict(job.start))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    optimizer = kinds[settings.optimizer](
        trainable, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    for chosen in batch_indices(len(job.rows), settings, job.seed):
        batch = [job.rows[i] for i in chosen]
        size = max(len(row.prompt) + len(row.response) for row in batch)
        ids, labels, seen = (torch.full((len(batch), size), fill) for fill in (0, -100, 0))
        for j, row in enumerate(batch):
            length = len(row.prompt) + len(row.response)
            ids[j, :length] = torch.tensor([*row.prompt, *row.response])
            labels[j, len(row.prompt) : length] = torch.tensor(row.response)
            seen[j, :length] = 1
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=seen, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)
        optimizer.step()
    return dict(peft.get_peft_model_state_dict(model, save_embedding_layers=False))


def largest_difference(left: Adapter, right: Adapter) -> float:
    assert set(left) == set(right)
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_cohort_of_different_ranks_and_lengths_equals_peft_one_by_one(architecture: str) -> None:
    base = tiny_base(architecture)
    names = TARGETS.get(architecture, ("q_proj", "v_proj"))
    targets = find_targets(base.model, names)
    settings = LocalSettings(steps=5, batch_size=4, learning_rate=5e-3, weight_decay=0.1)
    ranks = (8, 4, 2, 4)
    rows = (
        draw_rows(11, 20, 1),
        draw_rows(9, 0, 2),
        draw_rows(3, 9, 3),
        [*draw_rows(4, 30, 4), *draw_rows(4, 2, 5, longest=40)],
    )
    tasks = [
        task(targets, own, rank, 100 + i)
        for i, (own, rank) in enumerate(zip(rows, ranks, strict=True))
    ]
    outcomes = train_cohort(base, targets, tasks, settings, dropout=0.0, budget=150)
    assert base.packed
    for job, rank, outcome in zip(tasks, ranks, outcomes, strict=True):
        alone = with_peft(architecture, names, job, rank, settings)
        assert largest_difference(outcome.adapter, alone) < TOLERANCE
        assert largest_difference(outcome.adapter, job.start) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        LocalSettings(optimizer="adam", weight_decay=0.1),
        LocalSettings(optimizer="sgd", learning_rate=0.5, max_grad_norm=0.3),
        LocalSettings(epochs=2, batch_size=3),
    ],
)
def test_every_optimizer_and_epochs_equal_torch(settings: LocalSettings) -> None:
    base = tiny_base()
    targets = find_targets(base.model, ())
    tasks = [
        task(targets, draw_rows(count, 6, count), seed=count) for count in (4, 7)
    ]  # with epochs: 4 and 6 steps
    for job, outcome in zip(
        tasks, train_cohort(base, targets, tasks, settings, 0.0, 500), strict=True
    ):
        assert (
            largest_difference(
                outcome.adapter, with_peft("llama", ("q_proj", "v_proj"), job, 4, settings)
            )
            < TOLERANCE
        )


def test_the_padded_path_equals_the_packed_path() -> None:
    from dataclasses import replace

    base = tiny_base()
    targets = find_targets(base.model, ("q_proj", "down_proj"))
    tasks = [task(targets, draw_rows(9, 12, 1)), task(targets, draw_rows(5, 0, 2))]
    settings = LocalSettings(steps=4)
    packed, padded = (
        train_cohort(which, targets, tasks, settings, 0.0, 200)
        for which in (base, replace(base, packed=False))
    )
    for left, right in zip(packed, padded, strict=True):
        assert largest_difference(left.adapter, right.adapter) < TOLERANCE
        assert math.isclose(left.loss, right.loss, rel_tol=1e-5)


def test_the_token_budget_changes_nothing_but_rounding() -> None:
    base = tiny_base()
    targets = find_targets(base.model, ())
    tasks = [task(targets, draw_rows(8, 10, 1)), task(targets, draw_rows(8, 3, 2))]
    wide, narrow = (
        train_cohort(base, targets, tasks, LocalSettings(), 0.0, budget) for budget in (5000, 1)
    )
    for left, right in zip(wide, narrow, strict=True):
        assert largest_difference(left.adapter, right.adapter) < TOLERANCE
        assert left.response_tokens == right.response_tokens


def run_alone_and_together(dropout: float) -> tuple[LocalOutcome, LocalOutcome]:
    base = tiny_base()
    targets = find_targets(base.model, ())
    mine, others = (
        task(targets, draw_rows(9, 10, 1)),
        [task(targets, draw_rows(6, 5, i), seed=i) for i in range(3)],
    )
    alone = train_cohort(base, targets, [mine], LocalSettings(), dropout, 400)[0]
    together = train_cohort(base, targets, [*others, mine], LocalSettings(), dropout, 400)[-1]
    return alone, together


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_client_does_not_depend_on_who_shares_its_cohort(dropout: float) -> None:
    alone, together = run_alone_and_together(dropout)
    assert largest_difference(alone.adapter, together.adapter) < TOLERANCE


def test_dropout_acts_in_training_and_the_base_stays_in_eval_mode() -> None:
    with_dropout, without = run_alone_and_together(0.5)[0], run_alone_and_together(0.0)[0]
    assert largest_difference(with_dropout.adapter, without.adapter) > 100 * TOLERANCE
    assert not tiny_base().model.training


def test_smaller_ranks_keep_their_shape_and_the_zero_padding_stays_zero() -> None:
    base = tiny_base()
    targets = find_targets(base.model, ())
    small, large = (
        task(targets, draw_rows(6, 5, 1), rank=2),
        task(targets, draw_rows(6, 5, 2), rank=8),
    )
    outcomes = train_cohort(
        base, targets, [small, large], LocalSettings(weight_decay=0.1), 0.0, 400
    )
    for job, outcome in zip((small, large), outcomes, strict=True):
        assert {name: tensor.shape for name, tensor in outcome.adapter.items()} == {
            name: tensor.shape for name, tensor in job.start.items()
        }
    alone = train_cohort(base, targets, [small], LocalSettings(weight_decay=0.1), 0.0, 400)[0]
    assert largest_difference(alone.adapter, outcomes[0].adapter) < TOLERANCE


def test_a_client_that_diverges_is_reported_and_the_others_go_on() -> None:
    base = tiny_base()
    targets = find_targets(base.model, ())
    bad = {
        name: torch.full_like(tensor, 1e30) for name, tensor in start_adapter(targets, 4, 1).items()
    }
    good = task(targets, draw_rows(6, 5, 2))
    broken, fine = train_cohort(
        base, targets, [LocalTask(bad, 1.0, draw_rows(6, 5, 1), 1), good], LocalSettings(), 0.0, 400
    )
    assert "non-finite loss at local step 1" in broken.failure and "learning_rate" in broken.failure
    assert broken.adapter.keys() == bad.keys() and all(
        torch.equal(broken.adapter[name], bad[name]) for name in bad
    )
    assert not fine.failure
    assert (
        largest_difference(
            fine.adapter, train_cohort(base, targets, [good], LocalSettings(), 0.0, 400)[0].adapter
        )
        < TOLERANCE
    )


def test_kept_moments_make_two_rounds_equal_one_long_round() -> None:
    base = tiny_base()
    targets = find_targets(base.model, ())
    rows = draw_rows(4, 5, 1)  # one batch of all rows, so that the order of batches does not matter
    settings = LocalSettings(steps=3, batch_size=4, optimizer_state="kept", max_grad_norm=0)
    first = train_cohort(base, targets, [task(targets, rows)], settings, 0.0, 400)[0]
    second = train_cohort(
        base,
        targets,
        [LocalTask(first.adapter, ALPHA / 4, rows, 8, moments=first.moments)],
        settings,
        0.0,
        400,
    )[0]
    fresh = train_cohort(
        base, targets, [LocalTask(first.adapter, ALPHA / 4, rows, 8)], settings, 0.0, 400
    )[0]
    long = train_cohort(
        base,
        targets,
        [task(targets, rows)],
        LocalSettings(steps=6, batch_size=4, max_grad_norm=0),
        0.0,
        400,
    )[0]
    assert largest_difference(second.adapter, long.adapter) < TOLERANCE
    assert largest_difference(fresh.adapter, long.adapter) > 10 * TOLERANCE


def test_a_gradient_hook_changes_the_step_of_its_own_client_only() -> None:
    base = tiny_base()
    targets = find_targets(base.model, ())
    settings = LocalSettings(optimizer="sgd", learning_rate=1.0, max_grad_norm=0, steps=2)

    def nothing(gradient: Adapter, parameters: Adapter) -> Adapter:
        return {name: torch.zeros_like(tensor) for name, tensor in gradient.items()}

    rows = draw_rows(6, 5, 1)
    held, free = train_cohort(
        base, targets, [task(targets, rows, hook=nothing), task(targets, rows)], settings, 0.0, 400
    )
    assert largest_difference(held.adapter, task(targets, rows).start) == 0.0
    assert largest_difference(free.adapter, task(targets, rows).start) > 1e-4


def test_batches_cover_every_row_before_any_comes_again() -> None:
    steps = list(batch_indices(10, LocalSettings(steps=5, batch_size=4), 3))
    flat = [index for batch in steps for index in batch]
    assert [len(batch) for batch in steps] == [4] * 5
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    epochs = list(batch_indices(10, LocalSettings(epochs=2, batch_size=4), 3))
    assert [len(batch) for batch in epochs] == [4, 4, 2, 4, 4, 2]
    assert list(batch_indices(3, LocalSettings(steps=2, batch_size=8), 1))[0].__len__() == 3
