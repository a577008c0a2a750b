"""Answers that are asked for again until a critic is content.

The half of ReAd (Zhang et al. 2024, arXiv 2405.14314) that runs when a model is asked: what it
proposes is scored, and while the score is below a threshold it is asked once more, told what it
proposed before and what that was worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from fedmira.errors import ConfigError

__all__ = ["Attempt", "Refined", "refine"]

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Attempt(Generic[Answer]):
    """What was proposed, and what the critic gave for it.

    Attributes:
        answer: as it was proposed.
        score: its advantage, or whatever the critic measures; more is better.
    """

    answer: Answer
    score: float


@dataclass(frozen=True, slots=True)
class Refined(Generic[Answer]):
    """How refining ended.

    Attributes:
        answer: of the attempt with the highest score, of equals the first.
        score: of that answer.
        reached: whether the score is at or above the threshold.
        attempts: all of them, in order.
    """

    answer: Answer
    score: float
    reached: bool
    attempts: tuple[Attempt[Answer], ...]


def refine(
    propose: Callable[[Sequence[Attempt[Answer]]], Answer],
    score: Callable[[Answer], float],
    threshold: float,
    tries: int,
) -> Refined[Answer]:
    """Asks for answers until one scores at or above a threshold, or all tries are used up.

    >>> import fedmira
    >>> refined = fedmira.refine(
    ...     propose=lambda before: len(before) + 1, score=float, threshold=2.0, tries=5
    ... )
    >>> refined.answer, refined.reached, len(refined.attempts)
    (2, True, 2)

    Args:
        propose: gives an answer, told the attempts before it; none at first.
        score: what an answer is worth, a number; more is better.
        threshold: the least score that is enough.
        tries: most answers that are asked for, 1 or more.

    Returns:
        The best answer, which is the last one where the threshold was reached.

    Raises:
        ConfigError: `tries` or `threshold` cannot be used, or a score is no number.
    """
    if isinstance(tries, bool) or not isinstance(tries, int) or tries < 1:
        raise ConfigError(f"tries is {tries!r}; must be a whole number, 1 or more")
    if math.isnan(threshold):
        raise ConfigError("threshold is NaN, which no score reaches; give a number")
    attempts: list[Attempt[Answer]] = []
    while len(attempts) < tries and not (attempts and attempts[-1].score >= threshold):
        answer = propose(tuple(attempts))
        value = float(score(answer))
        if math.isnan(value):
            raise ConfigError(
                f"score of attempt {len(attempts) + 1} is NaN; score must return a number, and "
                "-inf for an answer that cannot be judged"
            )
        attempts.append(Attempt(answer, value))
    best = max(attempts, key=lambda attempt: attempt.score)
    return Refined(best.answer, best.score, best.score >= threshold, tuple(attempts))
