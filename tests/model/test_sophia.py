"""Sophia as clients' optimizer.

Its step by the paper's formula, its curvature by enumerating labels, its place in a cohort.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import peft
import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmira.adapters import Adapter
from fedmira.config import LocalSettings
from fedmira.model import (
    LocalTask,
    find_targets,
    start_adapter,
    train_cohort,
)
from fedmira.model.packed.response_loss import draw_targets, sampled_response_loss
from fedmira.model.training.batches import batch_indices
from fedmira.model.training.curvature import TargetDraws
from fedmira.model.training.optimizers import CohortOptimizer, Moments, add_curvature
from tiny import TinyRow, draw_rows, tiny_base, tiny_model

ALPHA = 16.0
BETA1, BETA2 = 0.965, 0.95  # Fed-Sophia's
TOLERANCE = 5e-5
SOPHIA = LocalSettings(
    optimizer="sophia", steps=4, batch_size=4, learning_rate=2e-3, sophia_refresh=3, max_grad_norm=0
)


def task(rows: Sequence[TinyRow], seed: int = 7, rank: int = 4, **more: object) -> LocalTask:
    targets = find_targets(tiny_base().model, ())
    return LocalTask(start_adapter(targets, rank, 11), ALPHA / rank, rows, seed, **more)  # type: ignore[arg-type]


def moved(task: LocalTask, seed: int) -> LocalTask:
    """The same task from an adapter whose B is not zero.

    So A has a gradient from the first step on.
    """
    draw = torch.Generator().manual_seed(seed)
    noisy = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in task.start.items()
    }
    return replace(task, start=noisy)


def largest_difference(left: Adapter, right: Adapter) -> float:
    assert set(left) == set(right)
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def one_step(
    optimizer: CohortOptimizer, value: Tensor, gradient: Tensor, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor]:
    """One client's value after a step from these moments, and how many entries were clipped."""
    moments = Moments(first.clone()[None], second.clone()[None], torch.zeros(1, dtype=torch.long))
    values = value.clone()[None]
    clipped = optimizer.step(values, gradient[None], moments, torch.tensor([0]))
    assert clipped is not None
    return values[0], clipped[0]


def test_on_a_quadratic_an_unclipped_step_of_size_one_is_newtons() -> None:
    """f = 1/2 sum h x^2 has gradient h x and curvature h.

    From a momentum that equals the gradient the step ends at the minimum.
    """
    curvature, start = torch.tensor([0.5, 2.0, 10.0]), torch.tensor([1.0, -3.0, 0.25])
    gradient = curvature * start
    end, clipped = one_step(
        CohortOptimizer("sophia", 1.0, 0.0, gamma=1.0, rho=10.0),
        start,
        gradient,
        gradient,
        curvature,
    )
    assert torch.allclose(end, torch.zeros(3), atol=1e-6) and int(clipped) == 0
    first, _ = one_step(
        CohortOptimizer("sophia", 1.0, 0.0, gamma=1.0, rho=10.0),
        start,
        gradient,
        torch.zeros(3),
        curvature,
    )
    assert torch.allclose(first, start * BETA1), (
        "from empty momentum: m = (1 - b1) g, so a share 1 - b1 of Newton's step"
    )


def test_without_curvature_the_step_is_that_of_sign_descent() -> None:
    """h = 0: m / epsilon is clipped to rho everywhere, except where m is 0."""
    start, gradient = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([3.0, -1e-4, 0.0])
    end, clipped = one_step(
        CohortOptimizer("sophia", 0.1, 0.0, gamma=1.0, rho=0.5),
        start,
        gradient,
        torch.zeros(3),
        torch.zeros(3),
    )
    assert torch.allclose(end, start - 0.1 * 0.5 * gradient.sign()) and int(clipped) == 2


def test_weight_decay_is_decoupled_from_gradient_and_curvature() -> None:
    start, zeros = torch.tensor([2.0, -4.0]), torch.zeros(2)
    end, _ = one_step(
        CohortOptimizer("sophia", 0.1, 0.5), start, zeros, zeros, torch.tensor([1.0, 100.0])
    )
    assert torch.allclose(end, start * (1 - 0.1 * 0.5))


positive = st.floats(0.05, 20)


@settings(deadline=None)
@given(positive, positive, positive, st.integers(0, 10**6))
def test_sophias_and_fed_sophias_way_of_writing_are_the_same_step(
    gamma: float, rho: float, factor: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    value, gradient, first = (torch.randn(6, generator=draw) for _ in range(3))
    curvature = torch.rand(6, generator=draw)
    here, clipped_here = one_step(
        CohortOptimizer("sophia", 0.01, 0.0, gamma, rho), value, gradient, first, curvature
    )
    other = CohortOptimizer("sophia", 0.01 / factor, 0.0, gamma / factor, rho * factor)
    there, clipped_there = one_step(other, value, gradient, first, curvature)
    assert torch.allclose(here, there, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 5), (4, 5), (3, 2)])
def test_the_estimate_is_on_average_the_diagonal_of_the_gauss_newton_matrix(
    shape: tuple[int, int],
) -> None:
    """All labels of N tokens enumerated with their probabilities.

    Against J' (diag(p) - p p') J averaged over the tokens.
    """
    (num_tokens, hidden_size), vocabulary = shape, 3
    torch.manual_seed(num_tokens)
    head = nn.Linear(hidden_size, vocabulary).requires_grad_(False)
    inputs, weight = torch.randn(num_tokens, 4), torch.randn(4, hidden_size, requires_grad=True)
    probabilities = head(inputs @ weight.detach()).softmax(dim=1)
    middles = (
        probabilities.double().cumsum(dim=1) - probabilities.double() / 2
    )  # draws that give each label

    expected = torch.zeros(weight.numel())
    for labels in itertools.product(range(vocabulary), repeat=num_tokens):
        at = torch.arange(num_tokens)
        chance = probabilities[at, torch.tensor(labels)].prod()
        losses = sampled_response_loss(head, inputs @ weight, middles[at, torch.tensor(labels)])
        assert torch.allclose(losses, -probabilities[at, torch.tensor(labels)].log(), atol=1e-5), (
            "the label that the draw stands for"
        )
        (gradient,) = torch.autograd.grad(losses.mean(), weight)
        moments = Moments.empty(torch.zeros(1, weight.numel()))
        add_curvature(
            moments, gradient.flatten()[None].clone(), torch.tensor([0]), torch.tensor([num_tokens])
        )
        expected += chance * moments.second[0] / (1 - BETA2)

    exact = torch.zeros(weight.numel())
    for token in range(num_tokens):
        jacobian = torch.autograd.functional.jacobian(
            lambda w, t=token: head(inputs[t] @ w), weight.detach()
        ).flatten(1)
        p = probabilities[token]
        exact += (
            torch.einsum("vi,vw,wi->i", jacobian, torch.diag(p) - torch.outer(p, p), jacobian)
            / num_tokens
        )
    assert torch.allclose(expected, exact, rtol=1e-4, atol=1e-6)


def test_the_estimate_is_averaged_over_refreshes_of_the_clients_whose_turn_it_is() -> None:
    moments = Moments.empty(torch.zeros(3, 2))
    moments.second.fill_(1.0)
    gradients = torch.tensor([[2.0, 0.0], [9.0, 9.0], [1.0, 3.0]])
    add_curvature(moments, gradients, torch.tensor([0, 2]), torch.tensor([5, 10]))
    fresh = torch.tensor([[5 * 4.0, 0.0], [0.0, 0.0], [10 * 1.0, 10 * 9.0]])
    expected = BETA2 * 1.0 + (1 - BETA2) * fresh
    expected[1] = 1.0
    assert torch.allclose(moments.second, expected)


def test_equally_spaced_draws_give_each_token_its_share() -> None:
    log_probabilities = torch.tensor([0.5, 0.0, 0.25, 0.25]).log().expand(1000, 4)
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.bincount(draw_targets(log_probabilities, draws), minlength=4).tolist() == [
        500,
        0,
        250,
        250,
    ]
    edges = draw_targets(
        torch.tensor([[0.0, 1.0, 0.0]]).log().expand(2, 3),
        torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64),
    )
    assert edges.tolist() == [1, 1], "a token without probability is never drawn"


def test_losses_of_drawn_targets_and_their_gradients_are_those_of_cross_entropy() -> None:
    """Over several blocks, and for a head that is not a plain linear layer."""
    torch.manual_seed(0)
    head = nn.Linear(8, 50).requires_grad_(False)
    hidden, draws, weights = (
        torch.randn(200, 8),
        torch.rand(200, dtype=torch.float64),
        torch.rand(200),
    )
    logits = head(hidden)
    targets = draw_targets(logits.log_softmax(dim=1), draws)
    assert 20 < len(targets.unique()) <= 50
    results = []
    for loss in (
        lambda h: functional.cross_entropy(head(h), targets, reduction="none"),
        lambda h: sampled_response_loss(head, h, draws),
        lambda h: sampled_response_loss(nn.Sequential(head), h, draws),
    ):
        leaf = hidden.clone().requires_grad_()
        values = loss(leaf)
        results.append((values.detach(), torch.autograd.grad((values * weights).sum(), leaf)[0]))
    for values, gradient in results[1:]:
        assert torch.allclose(values, results[0][0], atol=1e-5) and torch.allclose(
            gradient, results[0][1], atol=1e-5
        )


def alone_by_the_formula(
    job: LocalTask, rank: int, settings: LocalSettings
) -> tuple[Adapter, float]:
    """One client with a plain PEFT model, padded rows and the formula written out.

    Its adapter and its share of clipped entries.
    """
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    peft.set_peft_model_state_dict(model, dict(job.start))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first, curvature = ([torch.zeros_like(parameter) for parameter in trainable] for _ in range(2))
    numbers = TargetDraws([job.seed])
    clipped = steps = 0
    for step, chosen in enumerate(batch_indices(len(job.rows), settings, job.seed)):
        batch = [job.rows[i] for i in chosen]
        scores, targets = responses(model, batch)
        if step % settings.sophia_refresh == 0:
            cumulated = scores.detach().double().softmax(dim=1).cumsum(dim=1)
            draws = torch.cat(list(numbers.of({0: batch})[0]))
            drawn = (cumulated <= draws[:, None]).sum(dim=1)
            estimates = torch.autograd.grad(
                functional.cross_entropy(scores, drawn), trainable, retain_graph=True
            )
            curvature = [
                BETA2 * h + (1 - BETA2) * len(drawn) * e * e
                for h, e in zip(curvature, estimates, strict=True)
            ]
        gradients = torch.autograd.grad(functional.cross_entropy(scores, targets), trainable)
        first = [BETA1 * m + (1 - BETA1) * g for m, g in zip(first, gradients, strict=True)]
        steps += 1
        with torch.no_grad():
            for parameter, m, h in zip(trainable, first, curvature, strict=True):
                ratio = m / (settings.sophia_gamma * h).clamp(min=1e-12)
                clipped += int((ratio.abs() > settings.sophia_rho).sum())
                parameter.mul_(1 - settings.learning_rate * settings.weight_decay)
                parameter.sub_(
                    settings.learning_rate * ratio.clamp(-settings.sophia_rho, settings.sophia_rho)
                )
    adapter = dict(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    return adapter, clipped / (steps * sum(parameter.numel() for parameter in trainable))


def responses(model: nn.Module, batch: Sequence[TinyRow]) -> tuple[Tensor, Tensor]:
    """Logits at the places that predict response tokens, row after row, and those tokens."""
    size = max(len(row.prompt) + len(row.response) for row in batch)
    ids, seen = (torch.zeros(len(batch), size, dtype=torch.long) for _ in range(2))
    for j, row in enumerate(batch):
        length = len(row.prompt) + len(row.response)
        ids[j, :length], seen[j, :length] = torch.tensor([*row.prompt, *row.response]), 1
    logits = model(input_ids=ids, attention_mask=seen).logits
    scores = torch.cat(
        [
            logits[j, len(row.prompt) - 1 : len(row.prompt) + len(row.response) - 1]
            for j, row in enumerate(batch)
        ]
    )
    return scores, torch.tensor([token for row in batch for token in row.response])


def test_a_cohort_of_different_ranks_equals_the_formula_client_by_client() -> None:
    base = tiny_base()
    targets = find_targets(base.model, ())
    settings = SOPHIA.model_copy(update={"weight_decay": 0.1, "sophia_gamma": 0.5, "steps": 5})
    jobs = [
        moved(task(draw_rows(count, 6, count), seed=count, rank=rank), count)
        for count, rank in ((9, 4), (5, 2), (3, 8))
    ]
    for job, rank, outcome in zip(
        jobs, (4, 2, 8), train_cohort(base, targets, jobs, settings, 0.0, 150), strict=True
    ):
        adapter, share = alone_by_the_formula(job, rank, settings)
        assert largest_difference(outcome.adapter, adapter) < TOLERANCE
        assert largest_difference(outcome.adapter, job.start) > 20 * TOLERANCE
        assert outcome.clip_share == pytest.approx(share, abs=2e-3) and 0 < share < 1


def test_draws_depend_neither_on_the_cohort_nor_on_the_budget_nor_on_the_path() -> None:
    base = tiny_base()
    targets = find_targets(base.model, ())
    mine = moved(task(draw_rows(9, 10, 1)), 1)
    others = [moved(task(draw_rows(6, 5, i), seed=i), i) for i in range(3)]
    alone = train_cohort(base, targets, [mine], SOPHIA, 0.0, 400)[0]
    together = train_cohort(base, targets, [*others, mine], SOPHIA, 0.0, 400)[-1]
    narrow = train_cohort(base, targets, [mine], SOPHIA, 0.0, 1)[0]
    padded = train_cohort(replace(base, packed=False), targets, [mine], SOPHIA, 0.0, 400)[0]
    for other in (together, narrow, padded):
        assert largest_difference(alone.adapter, other.adapter) < TOLERANCE
    seeded = train_cohort(
        base,
        targets,
        [replace(mine, seed=8)],
        SOPHIA.model_copy(update={"batch_size": 9}),
        0.0,
        400,
    )[0]
    again = train_cohort(
        base,
        targets,
        [replace(mine, seed=9)],
        SOPHIA.model_copy(update={"batch_size": 9}),
        0.0,
        400,
    )[0]
    assert largest_difference(seeded.adapter, again.adapter) > TOLERANCE, (
        "the same batches, other draws"
    )


def test_at_the_common_start_the_first_step_moves_b_alone() -> None:
    """B = 0: A has neither gradient nor curvature, and 0 / epsilon is 0, not a sign."""
    base = tiny_base()
    job = task(draw_rows(6, 5, 1))
    outcome = train_cohort(
        base, find_targets(base.model, ()), [job], SOPHIA.model_copy(update={"steps": 1}), 0.0, 400
    )[0]
    for name, tensor in outcome.adapter.items():
        assert torch.equal(tensor, job.start[name]) == (".lora_A." in name)


def test_kept_state_goes_on_where_it_left_off_and_counts_local_steps() -> None:
    """Batches of all rows, so that a pass always costs the same.

    Tokens tell how many passes were made.
    """
    base = tiny_base()
    targets = find_targets(base.model, ())
    kept = SOPHIA.model_copy(update={"steps": 3, "optimizer_state": "kept", "sophia_refresh": 10})
    job = moved(task(draw_rows(4, 5, 1)), 1)
    first = train_cohort(base, targets, [job], kept, 0.0, 400)[0]
    second = train_cohort(
        base,
        targets,
        [replace(job, start=first.adapter, moments=first.moments, seed=8)],
        kept,
        0.0,
        400,
    )[0]
    fresh = train_cohort(
        base, targets, [replace(job, start=first.adapter, seed=8)], kept, 0.0, 400
    )[0]
    long = train_cohort(base, targets, [job], kept.model_copy(update={"steps": 6}), 0.0, 400)[0]
    assert largest_difference(second.adapter, long.adapter) < TOLERANCE
    assert largest_difference(fresh.adapter, long.adapter) > 2 * TOLERANCE
    a_pass = first.tokens // 4  # three steps and one estimate
    assert (second.tokens, long.tokens) == (3 * a_pass, 7 * a_pass)
    often = kept.model_copy(update={"sophia_refresh": 2})
    begun = train_cohort(base, targets, [job], often, 0.0, 400)[0]
    after = train_cohort(
        base, targets, [replace(job, start=begun.adapter, moments=begun.moments)], often, 0.0, 400
    )[0]
    assert (begun.tokens, after.tokens) == (5 * a_pass, 4 * a_pass), (
        "estimates before steps 1, 3 and 5 of all six"
    )
    assert begun.response_tokens == after.response_tokens == first.response_tokens, (
        "estimates are no training tokens"
    )


def test_estimates_leave_dropout_alone() -> None:
    """The same dropout, whether there are many estimates or one.

    With rho so small that every entry is clipped, h has no say.
    """
    base = tiny_base()
    targets = find_targets(base.model, ())
    job = moved(task(draw_rows(6, 5, 1)), 1)
    signs = SOPHIA.model_copy(update={"sophia_rho": 1e-12, "learning_rate": 1e9, "steps": 2})
    often, once = (
        train_cohort(
            base, targets, [job], signs.model_copy(update={"sophia_refresh": turn}), 0.5, 400
        )[0]
        for turn in (1, 5)
    )
    assert often.first_loss == once.first_loss and math.isclose(
        often.last_loss, once.last_loss, rel_tol=1e-4
    )
    assert once.last_loss != train_cohort(base, targets, [job], signs, 0.0, 400)[0].last_loss


def test_a_client_that_diverges_is_reported_and_the_others_go_on() -> None:
    base = tiny_base()
    targets = find_targets(base.model, ())
    good = moved(task(draw_rows(6, 5, 2)), 2)
    bad = replace(
        good, start={name: torch.full_like(tensor, 1e30) for name, tensor in good.start.items()}
    )
    broken, fine = train_cohort(base, targets, [bad, good], SOPHIA, 0.0, 400)
    assert "non-finite loss at local step 1" in broken.failure and not fine.failure
    assert (
        largest_difference(
            fine.adapter, train_cohort(base, targets, [good], SOPHIA, 0.0, 400)[0].adapter
        )
        < TOLERANCE
    )
