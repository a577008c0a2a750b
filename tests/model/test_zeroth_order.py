"""Training by slopes along random directions.

True slopes, steps that seeds and coefficients replay, clients kept apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from fedmira.adapters import (
    Adapter,
    norm,
    subtract,
    weighted_sum,
)
from fedmira.adapters.directions import direction, moved_along
from fedmira.config import LocalSettings
from fedmira.model import (
    LocalOutcome,
    LocalTask,
    find_targets,
    start_adapter,
    train_cohort,
)
from tiny import draw_rows, tiny_base

SETTINGS = LocalSettings(
    optimizer="zeroth-order",
    steps=6,
    batch_size=4,
    learning_rate=0.01,
    zeroth_width=1e-2,
    zeroth_seeds=64,
)
RATE = 0.01


def jobs(ranks: Sequence[int] = (4,)) -> list[LocalTask]:
    targets = find_targets(tiny_base().model, ())
    starts = [
        weighted_sum(
            [
                start_adapter(targets, rank, 11),
                direction(1000 + rank, start_adapter(targets, rank, 11)),
            ],
            [1, 0.1],
        )
        for rank in ranks
    ]
    return [LocalTask(start, 2.0, draw_rows(4 + i, 6, i), 70 + i) for i, start in enumerate(starts)]


def trained(
    tasks: Sequence[LocalTask], settings: LocalSettings, budget: int = 400
) -> list[LocalOutcome]:
    base = tiny_base()
    return train_cohort(base, find_targets(base.model, ()), tasks, settings, 0.0, budget)


def sent(outcome: LocalOutcome) -> dict[int, float]:
    assert outcome.movement is not None
    return dict(
        zip(
            outcome.movement["seeds"].tolist(),
            outcome.movement["coefficients"].tolist(),
            strict=True,
        )
    )


def dot(left: Adapter, right: Adapter) -> float:
    return sum(float((left[name].double() * right[name].double()).sum()) for name in left)


def test_a_slope_is_the_gradient_along_its_direction() -> None:
    """One step on all rows: SGD's step gives the gradient, and the coefficient must be - lr g'z."""
    job = jobs()[0]
    plain = LocalSettings(
        optimizer="sgd", steps=1, batch_size=4, learning_rate=1.0, max_grad_norm=0
    )
    gradient = subtract(job.start, trained([job], plain)[0].adapter)
    for seed in range(5):
        settings = SETTINGS.model_copy(update={"steps": 1, "zeroth_width": 2e-3})
        [(chosen, coefficient)] = sent(trained([replace(job, seed=seed)], settings)[0]).items()
        z = direction(chosen, job.start)
        assert coefficient == pytest.approx(
            -RATE * dot(gradient, z), rel=0.02, abs=RATE * 2e-3 * norm(gradient)
        )


def test_without_a_limit_of_ones_own_coefficients_keep_their_magnitudes() -> None:
    """Clipped to 1, every step is as long as any other.

    What is left of a slope is its sign, as |g z| is far above 1.
    """
    job = jobs()[0]

    def lengths(settings: LocalSettings) -> list[float]:
        """|g z| of the first step from six seeds, as far as it was taken."""
        steps = [sent(trained([replace(job, seed=seed)], settings)[0]) for seed in range(6)]
        return [
            abs(c) / RATE * norm(direction(seed, job.start))
            for step in steps
            for seed, c in step.items()
        ]

    kept = lengths(
        LocalSettings(optimizer="zeroth-order", steps=1, batch_size=4, learning_rate=RATE)
    )
    clipped = lengths(
        LocalSettings(
            optimizer="zeroth-order", steps=1, batch_size=4, learning_rate=RATE, max_grad_norm=1.0
        )
    )
    assert clipped == pytest.approx([1.0] * 6, rel=1e-3)
    assert min(kept) > 1.0 and max(kept) > 3 * min(kept)


@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_seeds_and_coefficients_replay_the_training_at_every_rank(limit: float) -> None:
    """Twelve steps along eight candidates, so that some come again.

    Clipped steps count for what was left of them.
    """
    tasks = jobs((4, 2, 8))
    settings = SETTINGS.model_copy(
        update={"steps": 12, "zeroth_seeds": 8, "max_grad_norm": limit, "learning_rate": 0.003}
    )
    for task, outcome in zip(tasks, trained(tasks, settings), strict=True):
        assert not outcome.failure and 1 < len(sent(outcome)) <= 8
        assert outcome.movement is not None
        replayed = moved_along(task.start, outcome.movement)
        moved = norm(subtract(outcome.adapter, task.start))
        assert norm(subtract(outcome.adapter, replayed)) < 1e-5 * norm(task.start) and moved > 1e-3
        if limit:
            assert moved <= 12 * 0.003 * limit * (1 + 1e-5)


def test_a_client_does_not_depend_on_cohort_budget_or_path() -> None:
    """The width is large enough for rounding of the losses not to matter."""
    mine, *others = jobs((4, 4, 4))
    settings = SETTINGS.model_copy(update={"zeroth_width": 0.05})
    alone = trained([mine], settings)[0]
    base = tiny_base()
    padded = train_cohort(
        replace(base, packed=False), find_targets(base.model, ()), [mine], settings, 0.0, 400
    )[0]
    for outcome in (
        trained([*others, mine], settings)[-1],
        trained([mine], settings, budget=1)[0],
        padded,
    ):
        assert sent(outcome).keys() == sent(alone).keys()
        assert norm(subtract(outcome.adapter, alone.adapter)) < 0.01 * norm(
            subtract(alone.adapter, mine.start)
        )


def test_the_loss_falls() -> None:
    settings = SETTINGS.model_copy(
        update={"steps": 150, "learning_rate": 0.003, "zeroth_seeds": 4096}
    )
    outcome = trained(jobs(), settings)[0]
    assert outcome.last_loss < outcome.first_loss - 0.05


def test_no_dropout_and_no_movement_of_other_optimizers() -> None:
    base = tiny_base()
    job = jobs()[0]
    outcome = train_cohort(base, find_targets(base.model, ()), [job], SETTINGS, 0.5, 400)[0]
    assert outcome.first_loss == trained([job], SETTINGS)[0].first_loss
    assert trained([job], LocalSettings())[0].movement is None


def test_a_client_that_diverges_is_reported_and_sends_nothing() -> None:
    good, bad = jobs((4, 4))
    bad = replace(bad, start={name: tensor * 0 + 1e30 for name, tensor in bad.start.items()})
    fine, broken = trained([good, bad], SETTINGS)
    assert "non-finite" in broken.failure and broken.movement is None
    assert not fine.failure and sent(fine) == pytest.approx(
        sent(trained([good], SETTINGS)[0]), rel=0.02, abs=1e-5
    )
