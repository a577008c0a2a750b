"""Advantage-weighted training: the weights, and what a step with them is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmira.adapters import Adapter
from fedmira.config import Config, LocalSettings
from fedmira.model import (
    BaseModel,
    LocalOutcome,
    LocalTask,
    find_targets,
    start_adapter,
    train_cohort,
)
from fedmira.model.training.advantages import row_weights
from tiny import TinyRow, draw_rows, tiny_base

BETA = 0.5
TARGETS = ("q_proj", "down_proj")


def job(
    base: BaseModel, rows: Sequence[TinyRow], advantages: Sequence[float] | None, seed: int = 7
) -> LocalTask:
    start = start_adapter(find_targets(base.model, TARGETS), 4, 11)
    return LocalTask(start, 2.0, rows, seed, advantages=advantages)


def trained(
    tasks: Sequence[LocalTask], settings: LocalSettings, base: BaseModel | None = None
) -> list[LocalOutcome]:
    base = base or tiny_base()
    targets = find_targets(base.model, TARGETS)
    return train_cohort(base, targets, tasks, settings, dropout=0.0, budget=200)


def equal(left: Adapter, right: Adapter) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def difference(left: Adapter, right: Adapter) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def test_an_advantage_of_beta_times_log_2_weighs_twice_as_much() -> None:
    first, second = row_weights([0.0, BETA * math.log(2)], BETA)
    assert second / first == pytest.approx(2, abs=1e-12)


def test_no_row_weighs_more_than_twenty_times_one_of_advantage_0() -> None:
    usual, above, far = row_weights([0.0, 10.0, 1e300], BETA)  # exp(20) and more
    assert above / usual == pytest.approx(20, abs=1e-9)
    assert far == above
    below, at = row_weights([0.0, BETA * math.log(19)], BETA)
    assert at / below == pytest.approx(19, abs=1e-9)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=6))
def test_some_row_always_weighs_something(advantages: list[float]) -> None:
    weights = row_weights(advantages, 1e-3)
    assert max(weights) == 1
    assert all(0 <= weight <= 1 for weight in weights)


def test_without_a_temperature_advantages_change_no_bit() -> None:
    base, rows = tiny_base(), draw_rows(9, 12, 1)
    settings = LocalSettings(steps=3, batch_size=4)
    plain, told = trained(
        [job(base, rows, None), job(base, rows, [float(i) for i in range(9)])], settings
    )
    assert equal(plain.adapter, told.adapter)
    assert plain.loss == told.loss


@pytest.mark.parametrize("advantage", [0.0, -3.25, 1e9])
@pytest.mark.parametrize("optimizer", ["adamw", "sophia", "zeroth-order"])
def test_equal_advantages_are_bit_for_bit_unweighted(advantage: float, optimizer: str) -> None:
    base, rows = tiny_base(), draw_rows(9, 12, 1)
    plain = LocalSettings(steps=3, batch_size=4, optimizer=optimizer)  # type: ignore[arg-type]
    weighted = plain.model_copy(update={"advantage_temperature": BETA})
    (without,) = trained([job(base, rows, None)], plain)
    (with_,) = trained([job(base, rows, [advantage] * 9)], weighted)
    assert equal(without.adapter, with_.adapter)
    assert without.loss == with_.loss


def weighted_gradient_step(
    rows: Sequence[TinyRow], weights: Sequence[float], rate: float
) -> Adapter:
    """A step of plain descent on sum w_i l_i / sum w_i N_i, from steps on single rows.

    The gradient of l_i / N_i is what a step on the row alone moves, over the rate; the mixture of
    these with the shares w_i N_i is the gradient of the batch.
    """
    base = tiny_base()
    settings = LocalSettings(
        steps=1, batch_size=1, optimizer="sgd", learning_rate=rate, max_grad_norm=0
    )
    alone = trained([job(base, [row], None) for row in rows], settings)
    start = job(base, rows, None).start
    shares = [w * len(row.response) for w, row in zip(weights, rows, strict=True)]
    return {
        name: start[name]
        + sum(
            (share / sum(shares)) * (outcome.adapter[name] - start[name])
            for share, outcome in zip(shares, alone, strict=True)
        )
        for name in start
    }


@pytest.mark.parametrize("packed", [True, False])
def test_a_step_is_that_of_the_weighted_loss_packed_and_padded(packed: bool) -> None:
    base = replace(tiny_base(), packed=packed)
    rows = [*draw_rows(3, 12, 1), *draw_rows(2, 0, 2, longest=30)]
    advantages = [0.0, BETA * math.log(2), 5.0, -0.7, 0.3]
    weights = [1.0, 2.0, 20.0, math.exp(-0.7 / BETA), math.exp(0.3 / BETA)]
    settings = LocalSettings(
        steps=1,
        batch_size=5,
        optimizer="sgd",
        learning_rate=0.5,
        max_grad_norm=0,
        advantage_temperature=BETA,
    )
    (outcome,) = trained([job(base, rows, advantages)], settings, base)
    expected = weighted_gradient_step(rows, weights, 0.5)
    even = weighted_gradient_step(rows, [1.0] * 5, 0.5)
    assert difference(outcome.adapter, expected) < 2e-6
    assert difference(outcome.adapter, even) > 1e-4


def test_clients_of_a_cohort_weigh_only_their_own_rows() -> None:
    base = tiny_base()
    settings = LocalSettings(steps=3, batch_size=3, advantage_temperature=BETA)
    jobs = [
        job(base, draw_rows(6, 12, 1), [1.0, 0.0, -1.0, 0.5, 2.0, 0.0], 1),
        job(base, draw_rows(5, 0, 2), None, 2),
        job(base, draw_rows(7, 3, 3), [0.3 * i for i in range(7)], 3),
    ]
    together = trained(jobs, settings)
    for outcome, each in zip(together, jobs, strict=True):
        (alone,) = trained([each], settings)
        assert difference(outcome.adapter, alone.adapter) < 5e-6
        assert outcome.loss == pytest.approx(alone.loss, rel=1e-5)


def test_a_batch_of_one_row_has_nothing_to_weigh() -> None:
    with pytest.raises(ValueError, match=r"batch_size = 1 leaves nothing to weigh"):
        Config.model_validate({"local": {"advantage_temperature": 1.0, "batch_size": 1}})
