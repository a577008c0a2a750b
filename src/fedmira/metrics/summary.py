"""From a client's rows to its scores, and from all clients' figures to their summary."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedmira.metrics.table import TEXT_METRICS

__all__ = ["summarise", "text_scores"]


def text_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Means of all text metrics over rows.

    Args:
        predictions: generated texts, one a row.
        references: the rows' responses, in the same order.

    Returns:
        Name of each of `TEXT_METRICS` -> mean over rows.

    Raises:
        ValueError: there are no rows, or not as many predictions as references.
    """
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references; need "
            "equally many, and at least one"
        )
    return {
        name: math.fsum(
            metric.function(prediction, reference)
            for prediction, reference in zip(predictions, references, strict=True)
        )
        / len(predictions)
        for name, metric in TEXT_METRICS.items()
    }


def summarise(
    values: Sequence[float], weights: Sequence[float], *, higher_is_better: bool = False
) -> dict[str, float]:
    """One metric over all clients.

    >>> from fedmira.metrics import summarise
    >>> summarise([1.0, 3.0], [1, 3])
    {'mean': 2.0, 'weighted_mean': 2.5, 'worst_tenth': 3.0, 'spread': 1.0}

    Args:
        values: one for each client.
        weights: one for each client, such as its response tokens; only their proportions matter.
        higher_is_better: false for losses, true for Rouge-L and exact match.

    Returns:
        mean: every client counts alike.
        weighted_mean: by `weights`.
        worst_tenth: mean over the worst ceil(K / 10) of K clients.
        spread: standard deviation over clients (divisor K).

    Raises:
        ValueError: no clients, unequal lengths, or weights that are negative or all 0.
    """
    if len(values) != len(weights) or not values:
        raise ValueError(
            f"{len(values)} values with {len(weights)} weights; need equally many, and at "
            "least one client"
        )
    total_weight = math.fsum(weights)
    if min(weights) < 0 or total_weight <= 0:
        raise ValueError(
            f"weights sum to {total_weight:g} with smallest {min(weights):g}; they must be "
            "0 or more and not all 0"
        )
    count = len(values)
    mean = math.fsum(values) / count
    worst = sorted(values, reverse=not higher_is_better)[: math.ceil(count / 10)]
    return {
        "mean": mean,
        "weighted_mean": math.fsum(
            value * weight for value, weight in zip(values, weights, strict=True)
        )
        / total_weight,
        "worst_tenth": math.fsum(worst) / len(worst),
        "spread": math.sqrt(math.fsum((value - mean) ** 2 for value in values) / count),
    }
