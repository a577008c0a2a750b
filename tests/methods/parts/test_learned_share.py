"""A learned share: its steps against autograd on the parts with the share taken out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedmira.adapters import Adapter, digest, modules
from fedmira.methods.parts.learned_share import MOST, LearnedShare, after_training
from fedmira.methods.parts.rank_split import RankSplit
from lora_federation import dense, lora

SPLIT = RankSplit(2)
RATE, STEP = 0.05, 0.1


def loss(adapter: Adapter, aim: Adapter) -> Tensor:
    """1/2 |B A - C D|^2 over all modules, which does not split into entries."""
    targets = dense(aim)
    return (
        torch.stack(
            [
                (up @ down - targets[name]).square().sum()
                for name, (down, up) in modules(adapter).items()
            ]
        ).sum()
        / 2
    )


def folded(own: Adapter, rest: Adapter, share: Tensor) -> dict[str, Tensor]:
    """Both parts with their shares in B."""
    whole = {}
    for name, part in own.items():
        one, other = (
            (part, rest[name]) if ".lora_A." in name else (share * part, (1 - share) * rest[name])
        )
        whole[name] = torch.cat([one, other], dim=0 if ".lora_A." in name else 1)
    return whole


@pytest.mark.parametrize("first", [0.5, 0.2])
def test_the_share_steps_as_adam_on_the_gradient_of_the_loss_by_its_logit(first: float) -> None:
    """A reference in float64 that holds own part, rest and logit apart."""
    own, rest, aim = (
        {name: 0.3 * tensor.double() for name, tensor in lora(2, seed).items()}
        for seed in (1, 2, 3)
    )
    place = torch.logit(torch.tensor(first, dtype=torch.float64))
    adapter = folded(own, rest, torch.sigmoid(place))
    start = LearnedShare(
        SPLIT, {name: tensor.float() for name, tensor in adapter.items()}, first, RATE
    ).start()
    assert start.hook is not None and start.settle is not None
    present = dict(start.adapter)
    mean = square = 0.0
    for number in range(1, 7):
        leaf = place.clone().requires_grad_()
        leaves = {name: part.clone().requires_grad_() for name, part in own.items()}
        loss(folded(leaves, rest, torch.sigmoid(leaf)), aim).backward()  # type: ignore[no-untyped-call]
        slope, share = float(leaf.grad or 0.0), torch.sigmoid(place)
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        place = place - RATE * (mean / (1 - 0.9**number)) / (
            math.sqrt(square / (1 - 0.999**number)) + 1e-8
        )
        # What steps is g B_own, along the gradient of B_own over g; a step of B_own is that over g.
        for name, part in leaves.items():
            assert part.grad is not None
            size = 1.0 if ".lora_A." in name else 1 / float(share) ** 2
            own[name] = own[name] - STEP * size * part.grad
        views = {name: part.clone().requires_grad_() for name, part in present.items()}
        loss({name: part.double() for name, part in views.items()}, aim).backward()  # type: ignore[no-untyped-call]
        gradient = start.hook({name: part.grad for name, part in views.items()}, present)  # type: ignore[misc]
        assert not any(bool(part.any()) for part in SPLIT.frozen(gradient).values())
        present = {name: part - STEP * gradient[name] for name, part in present.items()}
        present |= start.settle(present)
        expected = folded(own, rest, torch.sigmoid(place))
        for name, part in present.items():
            torch.testing.assert_close(part, expected[name].float(), rtol=2e-4, atol=1e-5)
        found = after_training(SPLIT, start.adapter, present, first)
        assert found == pytest.approx(float(torch.sigmoid(place)), abs=1e-5)
    assert abs(found - first) > 0.03, "the share must have gone somewhere"


def test_the_share_goes_to_the_part_that_helps_and_is_never_lost_for_good() -> None:
    rest = lora(2, 5)
    for aim, side in ((rest, -1), ({n: -t if ".lora_B." in n else t for n, t in rest.items()}, 1)):
        own = {
            name: torch.zeros_like(t) if ".lora_B." in name else t for name, t in lora(2, 6).items()
        }
        adapter = folded(own, rest, torch.tensor(0.5))
        start = LearnedShare(SPLIT, adapter, 0.5, 1.0).start()
        assert start.hook is not None and start.settle is not None
        present = dict(start.adapter)
        for _ in range(40):
            views = {name: part.clone().requires_grad_() for name, part in present.items()}
            loss({name: part.double() for name, part in views.items()}, aim).backward()  # type: ignore[no-untyped-call]
            start.hook({name: part.grad for name, part in views.items()}, present)  # type: ignore[misc]
            present |= start.settle(present)  # the own part does not step
        share = after_training(SPLIT, start.adapter, present, 0.5)
        assert share == pytest.approx(1 - MOST if side < 0 else MOST, abs=1e-5)


def test_without_a_rest_there_is_no_share_to_learn() -> None:
    nothing = {
        name: torch.zeros_like(t) if ".lora_B." in name else t for name, t in lora(4, 1).items()
    }
    start = LearnedShare(SPLIT, nothing, 0.5, RATE).start()
    assert start.settle is None and start.hook is not None
    still = start.hook(lora(4, 2), nothing)
    assert not any(bool(part.any()) for part in SPLIT.frozen(still).values())
    assert after_training(SPLIT, nothing, lora(4, 3), 0.4) == 0.4
    assert digest(start.adapter) == digest(nothing)
