"""The table of metrics: everything that counts, summarises or shows them iterates it.

A new metric of generated texts is one entry of `TEXT_METRICS`. It is then measured by every engine,
and stands in metrics/clients.csv, adapters/index.json, the summary of run.json, the adapters'
cards, the page of the run and the tables of a comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fedmira.metrics.texts import exact_match, rouge_l, rouge_l_package

__all__ = ["LOSS_METRICS", "TEXT_METRICS", "Metric", "TextMetric", "metrics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A figure of each client's adapter on the client's own test rows.

    Attributes:
        name: its column in metrics/clients.csv and its key in JSON files; an identifier.
        title: what it is called where it stands alone, such as a row of a summary.
        heading: what it is called above a narrow column.
        meaning: one line for the adapters' cards: what is measured, and in which unit.
        higher_is_better: which clients are the worst tenth.
        weight: the column of metrics/clients.csv by which the weighted mean counts a client.
    """

    name: str
    title: str
    heading: str
    meaning: str
    higher_is_better: bool
    weight: Literal["test_tokens", "test_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextMetric(Metric):
    """A metric of generated texts; a client's figure is the mean over its test rows.

    Attributes:
        function: from a prediction and its reference to a finite number.
    """

    function: Callable[[str, str], float]
    higher_is_better: bool = True
    weight: Literal["test_tokens", "test_rows"] = "test_rows"


def _loss(name: str, title: str, heading: str, meaning: str) -> Metric:
    """A loss per response token."""
    return Metric(
        name=name,
        title=title,
        heading=heading,
        meaning=meaning,
        higher_is_better=False,
        weight="test_tokens",
    )


LOSS_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _loss(
            "base_loss",
            "Base model, before any training",
            "base loss",
            "test loss of the base with the untrained adapter",
        ),
        _loss(
            "before_align_loss",
            "After the last local training",
            "before server step",
            "test loss of the adapter as the client last sent it",
        ),
        _loss(
            "after_align_loss",
            "After the server's last step",
            "after server step",
            "test loss of this adapter",
        ),
    )
}
"""Name -> loss per response token, in the order of tables.

They differ in the adapter, not in the function.
"""

TEXT_METRICS: dict[str, TextMetric] = {
    metric.name: metric
    for metric in (
        TextMetric(
            name="rouge_l",
            title="Rouge-L (rouge_score)",
            heading="Rouge-L (rouge_score)",
            meaning="Rouge-L of greedy answers to the test rows (package rouge_score), 0 to 1",
            function=rouge_l,
        ),
        TextMetric(
            name="rouge_l_package",
            title="Rouge-L (rouge package)",
            heading="Rouge-L (rouge package)",
            meaning="the same by the package rouge 1.0.1",
            function=rouge_l_package,
        ),
        TextMetric(
            name="exact_match",
            title="Exact match",
            heading="exact match",
            meaning="share of answers that equal the expected one but for case, ASCII punctuation "
            "and white space",
            function=exact_match,
        ),
    )
}
"""Name -> score of a prediction against its reference, in the order of tables."""


def metrics() -> list[Metric]:
    """All metrics in the order of tables: losses, then scores of generated texts."""
    return [*LOSS_METRICS.values(), *TEXT_METRICS.values()]
