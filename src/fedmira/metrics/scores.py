"""Metrics of one client's test rows, and what they say over all clients.

Losses that carry their weight, Rouge-L in two dialects.
"""

from __future__ import annotations

import math
import string
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

__all__ = [
    "TEXT_SCORES",
    "TokenLoss",
    "exact_match",
    "rouge_l",
    "rouge_l_package",
    "summarise",
    "text_scores",
]

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """A loss that adds up over rows, batches and clients without losing its weight.

    `TokenLoss()` is the zero of addition, so `sum(losses, TokenLoss())` works.

    Attributes:
        total: cross-entropy in nats, summed over response tokens.
        tokens: how many response tokens that is.
    """

    total: float = 0.0
    tokens: int = 0

    def __add__(self, other: TokenLoss) -> TokenLoss:
        return TokenLoss(self.total + other.total, self.tokens + other.tokens)

    @property
    def per_token(self) -> float:
        """Nats per response token.

        Raises:
            ValueError: there are no tokens to divide by.
        """
        if self.tokens == 0:
            raise ValueError(
                "loss per token of 0 response tokens is undefined; evaluate at least one "
                "row with a response"
            )
        return self.total / self.tokens


def rouge_l(prediction: str, reference: str, *, use_stemmer: bool = False) -> float:
    """Rouge-L F1 as package `rouge_score` has it, 0..1.

    Longest common subsequence over tokens, lower case, letters and digits only.

    Most papers report this one. Natural Instructions' own script also stems (`use_stemmer=True`).
    Not comparable with `rouge_l_package`.
    """
    return float(_scorer(use_stemmer)(reference, prediction))


def rouge_l_package(prediction: str, reference: str) -> float:
    """Rouge-L F1 as package `rouge` 1.0.1 has it, 0..1.

    Union of subsequences over sentences, counted in unique words.

    FedKSeed and MIRA report this one, after lower case and strip; so do we. Sentences end at every
    full stop, also within a number. A text without a word (empty, or full stops only) scores 0. Not
    comparable with `rouge_l`: 'a a a a' against 'a' scores 1 here.
    """
    prediction, reference = prediction.lower().strip(), reference.lower().strip()
    if not prediction.strip(". \n\t") or not reference.strip(". \n\t"):
        return 0.0
    scorer = _package_scorer()
    # The package walks back through its table by recursion, a frame for each word of the two texts.
    with _recursion_room(2 * (len(prediction.split()) + len(reference.split()))):
        return float(scorer(prediction, reference))


def exact_match(prediction: str, reference: str) -> float:
    """1.0 where the texts are equal, else 0.0, after lower case, removal of ASCII punctuation, and joining of white space.

    This is the normalisation of Natural Instructions; articles stay. A prediction and a reference
    that both become empty count as equal.
    """
    return float(_normalise(prediction) == _normalise(reference))


TEXT_SCORES: Mapping[str, Callable[[str, str], float]] = {
    "rouge_l": rouge_l,
    "rouge_l_package": rouge_l_package,
    "exact_match": exact_match,
}
"""Name -> score of one prediction against its reference."""


def text_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Means of all text metrics over rows.

    Returns:
        Each of `TEXT_SCORES`, 0..1.

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
            metric(prediction, reference)
            for prediction, reference in zip(predictions, references, strict=True)
        )
        / len(predictions)
        for name, metric in TEXT_SCORES.items()
    }


def summarise(
    values: Sequence[float], weights: Sequence[float], *, higher_is_worse: bool = True
) -> dict[str, float]:
    """One metric over all clients.

    Args:
        values: one for each client.
        weights: one for each client, such as its response tokens; only their proportions matter.
        higher_is_worse: true for losses, false for Rouge-L and exact match.

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
    worst = sorted(values, reverse=higher_is_worse)[: math.ceil(count / 10)]
    return {
        "mean": mean,
        "weighted_mean": math.fsum(
            value * weight for value, weight in zip(values, weights, strict=True)
        )
        / total_weight,
        "worst_tenth": math.fsum(worst) / len(worst),
        "spread": math.sqrt(math.fsum((value - mean) ** 2 for value in values) / count),
    }


def _normalise(text: str) -> str:
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


# The Rouge packages are imported when they are first needed: one of them pulls in a language
# toolkit, which takes long to start.


@cache
def _scorer(use_stemmer: bool) -> Callable[[str, str], float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=use_stemmer)
    return lambda reference, prediction: scorer.score(reference, prediction)["rougeL"].fmeasure


@cache
def _package_scorer() -> Callable[[str, str], float]:
    from rouge import Rouge

    scorer = Rouge(metrics=["rouge-l"], stats=["f"])
    return lambda prediction, reference: scorer.get_scores(prediction, reference)[0]["rouge-l"]["f"]


@contextmanager
def _recursion_room(frames: int) -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + frames)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
