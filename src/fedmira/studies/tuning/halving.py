"""Successive halving: how many trials run how far.

Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter
Optimization", arXiv 1502.07943, as FederatedScope has it: n settings run r_1 rounds, the best
ceil(n / rate) of them go on from their saved state to round r_2, and so on until one is left, which
runs to the last round R:

    n_1 = n    n_{i+1} = ceil(n_i / rate)    until n_s = 1        r_i = ceil(R / rate^(s - i))
"""

from __future__ import annotations

from collections.abc import Sequence

from fedmira.errors import ConfigError

__all__ = ["check_stages", "stage_rounds", "stage_sizes"]


def stage_sizes(trials: int, rate: int) -> list[int]:
    """How many trials run in each stage.

    >>> from fedmira.studies.tuning.halving import stage_sizes
    >>> stage_sizes(9, 3)
    [9, 3, 1]

    Args:
        trials: in the first stage.
        rate: one of so many goes on, rounded up.

    Raises:
        ConfigError: nothing would be dropped.
    """
    if trials < 2 or rate < 2:
        raise ConfigError(
            f"halving with {trials} trials at rate {rate}: both must be 2 or more, as trials are "
            "dropped until one is left; give more --trials (or a larger space), and a --rate of 2 "
            "or 3"
        )
    sizes = [trials]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // rate))
    return sizes


def stage_rounds(rounds: int, stages: int, rate: int) -> list[int]:
    """The round up to which the trials of each stage run.

    >>> from fedmira.studies.tuning.halving import stage_rounds
    >>> stage_rounds(20, 3, 3)
    [3, 7, 20]

    Args:
        rounds: of a whole run.
        stages: how many there are.
        rate: as for `stage_sizes`.

    Raises:
        ConfigError: there are too few rounds for so many stages.
    """
    found = [-(-rounds // rate ** (stages - 1 - stage)) for stage in range(stages)]
    check_stages(found, rounds, stages)
    return found


def check_stages(ends: Sequence[int], rounds: int, stages: int) -> None:
    """Refuses stages that do not follow one another up to the last round.

    Args:
        ends: the last round of each stage.
        rounds: of a whole run.
        stages: how many there are.

    Raises:
        ConfigError: there are not as many ends as stages, they do not rise, or the last is not that
            of the run.
    """
    rising = all(first < second for first, second in zip(ends, ends[1:], strict=False))
    if len(ends) == stages and rising and ends[0] >= 1 and ends[-1] == rounds:
        return
    raise ConfigError(
        f"halving: {stages} stages cannot end after rounds {', '.join(map(str, ends))}; there must "
        f"be one end for each stage, they must rise from 1 on, and the last is rounds.count = "
        f"{rounds}: set rounds.count higher, take fewer --trials or a higher --rate, or give other "
        "--budgets"
    )
