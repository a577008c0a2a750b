"""The quadratic clients of experiments/fed_sophia.

Known minima and limits are met, so its rounds can be believed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "experiments" / "fed_sophia" / "quadratic.py"


@pytest.fixture(scope="module")
def quadratic() -> ModuleType:
    specification = importlib.util.spec_from_file_location("fed_sophia_quadratic", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # where its dataclass looks for itself
    specification.loader.exec_module(module)
    return module


def test_the_minimiser_has_no_gradient_and_no_gap(quadratic: ModuleType) -> None:
    problem = quadratic.Quadratics.draw(100.0, 0.5, 0.3)
    slope = problem.gradients(problem.minimiser.expand_as(problem.centres)).mean(0)
    assert float(slope.abs().max()) < 1e-14 and problem.gap(problem.minimiser) == 0
    moved = problem.minimiser + 0.1
    loss = (problem.curvatures * (moved - problem.centres).square()).sum(1).mean() / 2
    least = (problem.curvatures * (problem.minimiser - problem.centres).square()).sum(1).mean() / 2
    assert problem.gap(moved) == pytest.approx(float(loss - least))


def test_sgd_ends_at_the_fixed_point_of_its_mean_step(quadratic: ModuleType) -> None:
    problem = quadratic.Quadratics.draw(10.0, 0.5, 0.3)
    limit = quadratic.limit_of_sgd(problem, 0.2)
    gaps = quadratic.run(problem, "sgd", False, 0.2, rounds=120)
    assert gaps[-1] == pytest.approx(problem.gap(limit), rel=1e-6) and gaps[-1] > 1e-4 * gaps[0]
    alike = quadratic.Quadratics(
        problem.curvatures[:1].expand_as(problem.curvatures), problem.centres
    )
    assert torch.allclose(quadratic.limit_of_sgd(alike, 0.2), alike.minimiser)


def test_rounds_are_the_first_below_the_share(quadratic: ModuleType) -> None:
    assert quadratic.rounds_to([8.0, 4.0, 1.0, 2.0, 0.5], 0.125) == 2
    assert quadratic.rounds_to([8.0, 4.0], 0.1) is None


def test_sophia_does_not_mind_the_condition(quadratic: ModuleType) -> None:
    """With the exact curvature every coordinate of alike clients shrinks at the same pace.

    However flat the coordinate is.
    """
    round_counts = {}
    for condition in (10.0, 1000.0):
        problem = quadratic.Quadratics.draw(condition, 0.0, 0.0)
        round_counts[condition] = {
            name: quadratic.rounds_to(quadratic.run(problem, name, kept, rate, rounds=60), 1e-2)
            for name, kept, rate in (("sgd", False, 1.0), ("sophia", True, 0.1))
        }
    assert round_counts[1000.0]["sophia"] <= 1.5 * round_counts[10.0]["sophia"]
    assert (
        round_counts[1000.0]["sgd"] is None
        or round_counts[1000.0]["sgd"] > 3 * round_counts[10.0]["sgd"]
    )
