"""Which of several adapters a client should take, by its own validation rows.

The rule compares the client's own adapter with the best of the others. To choose the best of many
on few rows and to judge it on the same rows would promise too much, so the rows are dealt into
folds: of each fold the other folds choose, and the fold judges (cross-fitting). With n rows of t_i
response tokens and d_i the difference of the summed losses of row i, chosen minus own,

    D = sum d_i / sum t_i      s^2 = n / (n - 1)  sum (d_i - D t_i)^2 / (sum t_i)^2

and another adapter is taken where D + t(n - 1) s < 0, t(n - 1) being the one-sided quantile of
Student's t: a margin that grows as rows shrink, by the error and by the quantile. D is the ratio
estimator of a mean per token (Cochran 1977, Sampling Techniques, chapter 6); its error is measured
between rows, as the tokens of one answer hang together. Where several others stand to choice, rows
that judge in one fold choose in another, so that the judgements hang together: s is multiplied by
sqrt(1 + F / (F - 1)) with F folds, 1.5 with five (Nadeau & Bengio 2003, Inference for the
Generalization Error, equation 10, whose share of test to training rows is 1 / (F - 1)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from scipy.special import stdtrit

__all__ = ["CONFIDENCE", "FEWEST_ROWS", "FOLDS", "RULE", "Judgement", "Standing", "judge"]

CONFIDENCE = 0.9
"""One-sided: of clients whom no other adapter helps, at most one in ten takes one by chance."""

FOLDS = 5
FEWEST_ROWS = 4
"""With fewer rows nothing is judged."""

RULE = (
    "Another adapter than the client's own is taken where the validation rows show, with "
    f"{100 * CONFIDENCE:g} % confidence, that it has the lower loss; {FOLDS} folds choose and "
    "judge in turn, so that no row judges what it chose. With fewer than "
    f"{FEWEST_ROWS} validation rows, or where they cannot tell, the client keeps its own."
)


class Standing(StrEnum):
    """What the rows say of the others' adapters."""

    better = "better"
    unclear = "cannot tell"
    no_better = "no better"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a client takes, and how sure that is; losses are nats per response token.

    Attributes:
        choice: name of the adapter to take.
        standing: of the best other adapter against the client's own.
        best_other: which has the lowest loss on all rows besides the own; "" where there is none.
        rows: that judged.
        own_loss: of the client's own adapter, None where no row is there.
        difference: cross-fitted, other minus own, below 0 is a gain; None where nothing is judged.
        margin: how far below 0 the difference must be.
        reason: the same in a sentence.
    """

    choice: str
    standing: Standing
    best_other: str
    rows: int
    own_loss: float | None
    difference: float | None
    margin: float | None
    reason: str


def judge(
    losses: Mapping[str, Sequence[float]],
    tokens: Sequence[int],
    own: str,
    confidence: float = CONFIDENCE,
) -> Judgement:
    """Apply the rule to one client.

    >>> from fedmira.metrics import judge
    >>> found = judge({"alone": [2.0] * 9, "together": [1.8, 1.7] * 4 + [1.8]}, [1] * 9, "alone")
    >>> found.choice, str(found.standing)
    ('together', 'better')

    Args:
        losses: name of an adapter -> the summed loss of each validation row, in nats. An adapter
            with a loss that is not finite is never taken.
        tokens: response tokens of each row, in the same order.
        own: the name of the client's own adapter.
        confidence: one-sided, between 0.5 and 1.

    Raises:
        ValueError: own is not among the names, the numbers of rows differ, a row has no token, or
            the confidence is out of its range.
    """
    _check(losses, tokens, own, confidence)
    rows, mine = len(tokens), losses[own]
    total = sum(tokens)
    usable = {
        name: values
        for name, values in losses.items()
        if name != own and all(map(math.isfinite, values))
    }
    own_loss = math.fsum(mine) / total if rows else None
    if not usable:
        reason = "there is no other adapter" if len(losses) == 1 else "no other has a finite loss"
        return Judgement(own, Standing.no_better, "", rows, own_loss, None, None, reason)
    best = _lowest(usable, range(rows))
    if rows < FEWEST_ROWS:
        told = f"{rows} validation row{'s' * (rows != 1)}; {FEWEST_ROWS} are the fewest that judge"
        best = best if rows else ""
        return Judgement(own, Standing.unclear, best, rows, own_loss, None, None, told)
    if not all(map(math.isfinite, mine)):
        told = "its own adapter's loss is not finite"
        return Judgement(best, Standing.better, best, rows, own_loss, None, None, told)
    differences = [
        usable[name][row] - mine[row] for row, name in enumerate(_cross_fitted(usable, rows))
    ]
    mean = math.fsum(differences) / total
    spread = math.fsum(
        (found - mean * count) ** 2 for found, count in zip(differences, tokens, strict=True)
    )
    error = _correction(len(usable), rows) * math.sqrt(rows / (rows - 1) * spread) / total
    margin = float(stdtrit(rows - 1, confidence)) * error
    standing = (
        Standing.better
        if mean + margin < 0
        else Standing.no_better
        if mean >= 0
        else Standing.unclear
    )
    return Judgement(
        best if standing is Standing.better else own,
        standing,
        best,
        rows,
        own_loss,
        mean,
        margin,
        f"{best} is {abs(mean):.3f} {'below' if mean < 0 else 'above'} {own} on {rows} validation "
        f"rows; the margin is {margin:.3f}",
    )


def _check(
    losses: Mapping[str, Sequence[float]], tokens: Sequence[int], own: str, confidence: float
) -> None:
    if own not in losses:
        raise ValueError(f"own adapter {own!r} is not among {', '.join(losses) or 'none'}")
    for name, values in losses.items():
        if len(values) != len(tokens):
            raise ValueError(
                f"{name!r} has losses of {len(values)} rows, and there are {len(tokens)}"
            )
    if any(count < 1 for count in tokens):
        raise ValueError(f"a row has {min(tokens)} response tokens; needs at least 1")
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence is {confidence:g}; it must be at least 0.5 and below 1")


def _correction(others: int, rows: int) -> float:
    """By how much the error is greater where the folds chose; 1 where there was no choice."""
    folds = min(FOLDS, rows)
    return math.sqrt(1 + folds / (folds - 1)) if others > 1 else 1.0


def _cross_fitted(losses: Mapping[str, Sequence[float]], rows: int) -> list[str]:
    """For each row the name that the rows of the other folds choose."""
    folds = min(FOLDS, rows)
    chosen = [
        _lowest(losses, [row for row in range(rows) if row % folds != fold])
        for fold in range(folds)
    ]
    return [chosen[row % folds] for row in range(rows)]


def _lowest(losses: Mapping[str, Sequence[float]], rows: Sequence[int]) -> str:
    """The name with the lowest sum over these rows, of equals the first."""
    return min(losses, key=lambda name: math.fsum(losses[name][row] for row in rows))
