"""How good: metrics of a client's own test rows and their summary over clients."""

from fedmira.metrics.scores import (
    TEXT_SCORES,
    TokenLoss,
    exact_match,
    rouge_l,
    rouge_l_package,
    summarise,
    text_scores,
)

__all__ = [
    "TEXT_SCORES",
    "TokenLoss",
    "exact_match",
    "rouge_l",
    "rouge_l_package",
    "summarise",
    "text_scores",
]
