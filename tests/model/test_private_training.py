"""DP-SGD in local training: rows clipped one by one, noise of the size that is promised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from fedmira.adapters import Adapter, norm, subtract
from fedmira.config import LocalSettings
from fedmira.model import LocalTask, RowPrivacy, find_targets, start_adapter, train_cohort
from tiny import TinyRow, draw_rows, tiny_base

ALPHA = 8.0
RATE = 0.5
PLAIN = LocalSettings(optimizer="sgd", steps=1, batch_size=1, learning_rate=RATE, max_grad_norm=0.0)
OPEN = RowPrivacy(clip=0.05, noise=0.0, rate=1.0, batch=5, secret=False)


def task(rows: Sequence[TinyRow], seed: int = 7, rank: int = 4, **more: object) -> LocalTask:
    """From an adapter whose B is not zero, so that A has gradients too."""
    start = start_adapter(find_targets(tiny_base().model, ()), rank, 11)
    draw = torch.Generator().manual_seed(3)
    moved = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in start.items()
    }
    return LocalTask(moved, ALPHA / rank, rows, seed, **more)  # type: ignore[arg-type]


def trained(*tasks: LocalTask, settings: LocalSettings = PLAIN) -> list[Adapter]:
    base = tiny_base()
    targets = find_targets(base.model, ())
    outcomes = train_cohort(base, targets, tasks, settings, 0.0, 400)
    assert [outcome.failure for outcome in outcomes] == [""] * len(tasks)
    return [outcome.adapter for outcome in outcomes]


def gradient(row: TinyRow) -> dict[str, torch.Tensor]:
    """Of the row's mean loss, by one plain step on it alone."""
    alone = task([row])
    return {
        name: tensor / -RATE for name, tensor in subtract(trained(alone)[0], alone.start).items()
    }


def test_a_step_is_the_mean_of_the_rows_clipped_gradients() -> None:
    """Two clients of different ranks side by side, so that nobody's rows clip another's."""
    first, second = draw_rows(5, 31, 32), draw_rows(3, 41, 42)
    tasks = [
        task(first, privacy=OPEN),
        task(second, privacy=replace(OPEN, clip=1e6, batch=3)),
    ]
    for made, begun, rows in zip(trained(*tasks), tasks, (first, second), strict=True):
        assert begun.privacy is not None
        gradients = [gradient(row) for row in rows]
        shares = [min(1.0, begun.privacy.clip / norm(each)) for each in gradients]
        for name, tensor in made.items():
            total = sum(share * each[name] for share, each in zip(shares, gradients, strict=True))
            expected = begun.start[name] - RATE * total / len(rows)
            torch.testing.assert_close(tensor, expected, rtol=0, atol=2e-5)
    assert all(norm(gradient(row)) > 2 * OPEN.clip for row in first), "the clip must have acted"


@pytest.mark.parametrize("noise", [0.5, 4.0])
def test_the_noise_on_a_step_is_noise_times_clip_over_the_expected_rows(noise: float) -> None:
    rows = draw_rows(5, 31, 32)
    quiet, *noisy = (
        trained(task(rows, seed, privacy=replace(OPEN, noise=sigma)))[0]
        for seed, sigma in ((1, 0.0), (2, noise), (3, noise))
    )
    expected = RATE * noise * OPEN.clip / OPEN.batch
    for made in noisy:
        drawn = torch.cat([tensor.flatten() for tensor in subtract(made, quiet).values()]).double()
        # Of n draws the deviation is known to 1 / sqrt(2 n).
        assert float(drawn.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * len(drawn)))
        assert abs(float(drawn.mean())) < 5 * expected / math.sqrt(len(drawn))


def test_rows_take_part_by_chance_and_the_divisor_stays() -> None:
    """With a rate of 0.3 of 40 rows 12 are expected; without noise steps differ by who came."""
    rows, hidden = draw_rows(40, 31, 32), replace(OPEN, rate=0.3, batch=12, clip=1e-3)
    start = task(rows).start
    lengths = [
        norm(subtract(trained(task(rows, seed, privacy=hidden))[0], start)) for seed in range(6)
    ]
    assert len(set(lengths)) == 6
    # No row adds more than clip / batch, whoever came.
    assert max(lengths) <= RATE * hidden.clip * 40 / 12


def test_a_step_without_any_row_is_noise_alone() -> None:
    rows = draw_rows(3, 31, 32)
    never = replace(OPEN, rate=0.0, noise=1.0, batch=1)
    begun = task(rows, privacy=never)
    (made,) = trained(begun, settings=PLAIN.model_copy(update={"steps": 3}))
    drawn = torch.cat([tensor.flatten() for tensor in subtract(made, begun.start).values()])
    expected = RATE * OPEN.clip * math.sqrt(3)
    assert float(drawn.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * len(drawn)))


def test_secret_draws_differ_and_seeded_ones_repeat() -> None:
    rows = draw_rows(5, 31, 32)

    def made(secret: bool) -> Adapter:
        return trained(task(rows, privacy=replace(OPEN, noise=1.0, secret=secret)))[0]

    name = next(iter(task(rows).start))
    assert torch.equal(made(secret=False)[name], made(secret=False)[name])
    assert not torch.equal(made(secret=True)[name], made(secret=True)[name])
