"""Epsilon against computations of this file's own: closed forms, and integrals of densities."""

from __future__ import annotations

import math
from importlib.util import find_spec

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm

from fedmira.errors import ConfigError
from fedmira.privacy import epsilon_of, least_noise

needs_library = pytest.mark.skipif(
    find_spec("dp_accounting") is None,
    reason="needs dp-accounting, which is optional (pip install 'fedmira[privacy]')",
)


def gaussian_epsilon(noise: float, steps: int, delta: float) -> float:
    """Exact: n Gaussian mechanisms are one of mean shift sqrt(n) / noise (Balle and Wang 2018)."""
    shift = math.sqrt(steps) / noise

    def delta_of(epsilon: float) -> float:
        lower, upper = -shift / 2 - epsilon / shift, shift / 2 - epsilon / shift
        return float(norm.cdf(upper) - math.exp(epsilon + norm.logcdf(lower)))

    return float(brentq(lambda epsilon: delta_of(epsilon) - delta, 0, 1000, xtol=1e-10))


def sampled_log_densities(noise: float, rate: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Log densities of a step with the row (a mixture) and without it, and a cell's width."""
    places = np.linspace(-40 * noise - 1, 40 * noise + 2, 200_001)
    without = norm.logpdf(places, 0, noise)
    shifted = norm.logpdf(places, 1, noise)
    within = logsumexp([without + math.log1p(-rate), shifted + math.log(rate)], axis=0)
    return within, without, float(places[1] - places[0])


def one_step_epsilon(noise: float, rate: float, delta: float) -> float:
    """Exact to quadrature: the hockey-stick divergence of one sampled step, both ways round."""
    within, without, width = sampled_log_densities(noise, rate)

    def epsilon(first: np.ndarray, second: np.ndarray) -> float:
        def delta_of(bound: float) -> float:
            gap = np.exp(first) - np.exp(second + bound)
            return float(gap[gap > 0].sum() * width)

        return 0.0 if delta_of(0) <= delta else brentq(lambda e: delta_of(e) - delta, 0, 100)

    return max(epsilon(within, without), epsilon(without, within))


def renyi_epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """An upper bound: Renyi divergences by quadrature, composed by adding (Mironov 2017)."""
    within, without, width = sampled_log_densities(noise, rate)
    best = math.inf
    for order in (1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        both = [
            logsumexp(order * first + (1 - order) * second) + math.log(width)
            for first, second in ((within, without), (without, within))
        ]
        renyi = steps * max(both) / (order - 1)
        best = min(best, renyi + math.log(1 / delta) / (order - 1))
    return best


@needs_library
@pytest.mark.parametrize("noise", [0.8, 2.0, 11.0])
@pytest.mark.parametrize("steps", [1, 20, 400])
def test_without_sampling_it_is_the_closed_form(noise: float, steps: int) -> None:
    expected = gaussian_epsilon(noise, steps, 1e-5)
    assert expected <= epsilon_of(noise, 1.0, steps, 1e-5) * (1 + 1e-9) + 1e-9
    assert epsilon_of(noise, 1.0, steps, 1e-5) == pytest.approx(expected, rel=5e-3, abs=2e-3)


@needs_library
@pytest.mark.parametrize(("noise", "rate"), [(0.7, 0.1), (1.0, 0.5), (2.0, 0.9)])
def test_of_one_sampled_step_it_is_the_divergence_of_the_two_densities(
    noise: float, rate: float
) -> None:
    expected = one_step_epsilon(noise, rate, 1e-5)
    assert epsilon_of(noise, rate, 1, 1e-5) == pytest.approx(expected, rel=5e-3, abs=2e-3)


@needs_library
@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.0, 0.1, 100), (2.0, 0.4, 60)])
def test_many_sampled_steps_lie_between_one_and_the_renyi_bound(
    noise: float, rate: float, steps: int
) -> None:
    bound = renyi_epsilon(noise, rate, steps, 1e-5)
    found = epsilon_of(noise, rate, steps, 1e-5)
    assert one_step_epsilon(noise, rate, 1e-5) < found <= bound
    assert found > 0.6 * bound, "the bound is loose by a third at most in these cases"


@needs_library
@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_the_least_noise_spends_what_may_be_spent_and_no_less_would_do(rate: float) -> None:
    noise = least_noise(8.0, rate, 50, 1e-5)
    assert epsilon_of(noise, rate, 50, 1e-5) <= 8.0
    assert epsilon_of(noise * 0.995, rate, 50, 1e-5) > 8.0


@needs_library
def test_no_steps_spend_nothing_and_no_noise_spends_everything() -> None:
    assert epsilon_of(1.0, 0.5, 0, 1e-5) == 0
    assert epsilon_of(0.0, 0.5, 3, 1e-5) == math.inf


@needs_library
def test_an_epsilon_that_no_noise_keeps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.epsilon = 1e-06"):
        least_noise(1e-6, 1.0, 10**6, 1e-5)


@pytest.mark.skipif(find_spec("dp_accounting") is not None, reason="dp-accounting is installed")
def test_without_the_library_the_error_names_the_extra() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'fedmira\[privacy\]'"):
        epsilon_of(1.0, 1.0, 1, 1e-5)
