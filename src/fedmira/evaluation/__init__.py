"""How good: metrics of a client's own test rows and their summary over clients."""

from fedmira.evaluation.base import Evaluation, SplitName
from fedmira.evaluation.evaluate import Evaluator
from fedmira.evaluation.metrics import TEXT_SCORES, TokenLoss, exact_match, rouge_l, rouge_l_package, summarise, text_scores

__all__ = [
    "TEXT_SCORES",
    "Evaluation",
    "Evaluator",
    "SplitName",
    "TokenLoss",
    "exact_match",
    "rouge_l",
    "rouge_l_package",
    "summarise",
    "text_scores",
]
