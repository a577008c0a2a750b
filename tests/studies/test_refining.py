"""Refining stops at the first score that is enough, and at the last try."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fedmira import refine
from fedmira.errors import ConfigError
from fedmira.studies.refining import Attempt

SCORES = [0.1, 0.6, 0.4, 0.9]


def propose(before: Sequence[Attempt[int]]) -> int:
    return len(before)


def test_it_stops_at_the_first_score_at_or_above_the_threshold() -> None:
    refined = refine(propose, SCORES.__getitem__, threshold=0.6, tries=4)
    assert (refined.answer, refined.score, refined.reached) == (1, 0.6, True)
    assert [attempt.answer for attempt in refined.attempts] == [0, 1]


def test_it_stops_at_the_last_try_with_the_best_answer() -> None:
    refined = refine(propose, SCORES.__getitem__, threshold=0.8, tries=3)
    assert (refined.answer, refined.score, refined.reached) == (1, 0.6, False)
    assert len(refined.attempts) == 3


def test_a_proposal_is_told_what_came_before_and_what_it_was_worth() -> None:
    told: list[Sequence[Attempt[int]]] = []

    def remember(before: Sequence[Attempt[int]]) -> int:
        told.append(before)
        return len(before)

    refine(remember, SCORES.__getitem__, threshold=1.0, tries=3)
    assert told == [(), (Attempt(0, 0.1),), (Attempt(0, 0.1), Attempt(1, 0.6))]


@pytest.mark.parametrize("tries", [0, -1, 2.0, True])
def test_tries_that_are_no_count_are_refused(tries: object) -> None:
    with pytest.raises(ConfigError, match="tries is"):
        refine(propose, SCORES.__getitem__, threshold=1.0, tries=tries)  # type: ignore[arg-type]


def test_scores_and_thresholds_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="score of attempt 1 is NaN"):
        refine(propose, lambda _: float("nan"), threshold=1.0, tries=2)
    with pytest.raises(ConfigError, match="threshold is NaN"):
        refine(propose, SCORES.__getitem__, threshold=float("nan"), tries=2)
