"""What noise is worth, by the accountant of dp-accounting, which the extra `privacy` brings.

The mechanism is the Gaussian one on Poisson samples: every row takes part in a step with a
probability of its own, and noise of standard deviation noise * clip is added to the sum of clipped
vectors. Two sets of rows are neighbours where one row of the first is empty in the second
(REPLACE_SPECIAL): how many rows there are is no secret. Losses are composed as privacy loss
distributions.
"""

from __future__ import annotations

import math
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fedmira.errors import ConfigError

__all__ = ["epsilon_of", "least_noise", "require_accountant"]

LARGEST_NOISE = 1e4
"""A noise above this leaves nothing of any update."""
FAR = 1e4
"""A squared mean shift above which epsilon is in the thousands, and a plain bound will do.

Loss distributions would need gigabytes there.
"""
CELL = 1e-3
"""Width of the cells that losses are rounded up to: ten times the library's own.

Epsilon is larger by some 1e-5 for it, and found in an eighth of the time.
"""
PRECISION = 1e-3
"""How far above the least noise the one that is found may be, relatively."""


def require_accountant() -> Any:
    """The library.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("dp_accounting") is None:
        raise ConfigError(
            "privacy.kind: dp-accounting is not installed, and without it nobody can say what a "
            "run spends; install it with: pip install 'fedmira[privacy]'"
        )
    return import_module("dp_accounting")


@cache
def epsilon_of(noise: float, rate: float, steps: int, delta: float) -> float:
    """Epsilon of so many steps, rounded up by the accountant; inf without noise.

    Args:
        noise: standard deviation in clips.
        rate: probability with which a row takes part in a step, above 0 and 1 or less.
        steps: noisy steps in all.
        delta: probability with which the promise may fail.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    accounting = require_accountant()
    if steps == 0:
        return 0.0
    if noise == 0:
        return float("inf")
    shift = steps / noise / noise
    if shift > FAR:  # sampling aside: a bound of zero-concentrated privacy (Bun and Steinke 2016)
        return shift / 2 + math.sqrt(2 * shift * math.log(1 / delta))
    step = accounting.GaussianDpEvent(noise)
    if rate < 1:
        step = accounting.PoissonSampledDpEvent(rate, step)
    accountant = accounting.pld.PLDAccountant(
        accounting.NeighboringRelation.REPLACE_SPECIAL, value_discretization_interval=CELL
    )
    accountant.compose(step, steps)
    return float(accountant.get_epsilon(delta))


@cache
def least_noise(epsilon: float, rate: float, steps: int, delta: float) -> float:
    """The least noise whose steps stay within epsilon, to 0.1 %.

    Args:
        epsilon: of all steps together.
        rate: as for `epsilon_of`.
        steps: as for `epsilon_of`.
        delta: as for `epsilon_of`.

    Raises:
        ConfigError: no noise is enough, or dp-accounting is not installed.
    """
    below, above = 0.0, 1.0
    while epsilon_of(above, rate, steps, delta) > epsilon:
        below, above = above, 2 * above
        if above > LARGEST_NOISE:
            raise ConfigError(
                f"privacy.epsilon = {epsilon:g} with delta = {delta:g} cannot be kept over {steps} "
                "steps; raise it, or lower rounds.count or local.steps"
            )
    while above - below > PRECISION * above:
        middle = (below + above) / 2
        if epsilon_of(middle, rate, steps, delta) > epsilon:
            below = middle
        else:
            above = middle
    return above
