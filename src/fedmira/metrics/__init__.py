"""How good: one table of metrics of a client's own test rows, and their summary over clients."""

from fedmira.metrics.summary import summarise, text_scores
from fedmira.metrics.table import LOSS_METRICS, TEXT_METRICS, Metric, TextMetric, metrics
from fedmira.metrics.texts import exact_match, rouge_l, rouge_l_package
from fedmira.metrics.token_loss import TokenLoss

__all__ = [
    "LOSS_METRICS",
    "TEXT_METRICS",
    "Metric",
    "TextMetric",
    "TokenLoss",
    "exact_match",
    "metrics",
    "rouge_l",
    "rouge_l_package",
    "summarise",
    "text_scores",
]
