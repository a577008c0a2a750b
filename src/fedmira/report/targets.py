"""How soon a run reached a given test loss: rounds and seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fedmira.errors import ConfigError
from fedmira.report.records import Run

__all__ = ["TARGET_RULE", "Reached", "check_target", "mean_reached", "reached", "reached_text"]

TARGET_RULE = (
    "The first evaluated round whose mean test loss over the clients is at the target or "
    "below it, mean over seeds; seconds of local "
    "training and server steps up to then, without evaluation, which depend on the machine "
    "and on what else it did. A method has reached "
    "the target when all its seeds have."
)
"""What rounds and seconds to a target are, for readers."""


@dataclass(frozen=True, slots=True)
class Reached:
    """When the mean test loss over the clients was first at the target or below it.

    Attributes:
        rounds: the first such round that was evaluated; it may have been there earlier, between two
            evaluations.
        seconds: local training and server steps of the rounds up to it, without evaluation; None
            where the folder lacks the time of one.
    """

    rounds: int
    seconds: float | None


def check_target(target: float) -> None:
    """Refuse what no loss can be compared with.

    Raises:
        ConfigError: the target is not a finite number above 0.
    """
    if not math.isfinite(target) or target <= 0:
        raise ConfigError(
            f"target loss {target:g}: must be a finite number above 0, a mean test loss "
            "per response token such as 2.5"
        )


def reached(run: Run, target: float) -> Reached | None:
    """When the run reached the target, from metrics/rounds.csv and events.jsonl.

    None where no evaluated round did.

    Args:
        run: the run that is read.
        target: test loss per response token, mean over clients.
    """
    number = next(
        (
            int(row.round)
            for row in run.rounds
            if row.test_loss is not None and row.test_loss <= target
        ),
        None,
    )
    if number is None:
        return None
    training = [row.train_seconds for row in run.rounds if row.round <= number]
    combining = [
        event.numbers.get("combine_seconds", 0.0)
        for event in run.of_kind("round")
        if event.round <= number
    ]
    known = [seconds for seconds in training if seconds is not None]
    complete = len(known) == len(training) == number
    return Reached(number, sum(known) + sum(combining) if complete else None)


def mean_reached(runs: Sequence[Run], target: float) -> dict[str, Any]:
    """Columns for a method's row: seeds that reached the target.

    Mean rounds and seconds to it, None unless all seeds reached it.

    Args:
        runs: of one method, a run a seed.
        target: test loss per response token, mean over clients.
    """
    found = [reached(run, target) for run in runs]
    there = [each for each in found if each is not None]
    seconds = [each.seconds for each in there if each.seconds is not None]
    whole = len(there) == len(found)
    return {
        "target_loss": target,
        "seeds_to_target": len(there),
        "rounds_to_target": fmean(each.rounds for each in there) if whole else None,
        "seconds_to_target": fmean(seconds) if whole and len(seconds) == len(found) else None,
    }


def reached_text(row: Mapping[str, Any]) -> str:
    """The rounds to the target for people, or how many of the method's seeds reached it."""
    if row["rounds_to_target"] is not None:
        return f"{row['rounds_to_target']:.4g}"
    return (
        "not reached"
        if not row["seeds_to_target"]
        else f"reached by {row['seeds_to_target']} of {row['seeds']} seeds"
    )
