"""How good: the table of metrics, their summary over clients, and which adapter a client takes."""

from fedmira.metrics.gate import CONFIDENCE, RULE, Judgement, Standing, judge
from fedmira.metrics.summary import summarise, text_scores
from fedmira.metrics.table import LOSS_METRICS, TEXT_METRICS, Metric, TextMetric, metrics
from fedmira.metrics.texts import exact_match, rouge_l, rouge_l_package
from fedmira.metrics.token_loss import TokenLoss

__all__ = [
    "CONFIDENCE",
    "LOSS_METRICS",
    "RULE",
    "TEXT_METRICS",
    "Judgement",
    "Metric",
    "Standing",
    "TextMetric",
    "TokenLoss",
    "exact_match",
    "judge",
    "metrics",
    "rouge_l",
    "rouge_l_package",
    "summarise",
    "text_scores",
]
