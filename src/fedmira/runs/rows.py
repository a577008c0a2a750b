"""A row for each client, and what the rows say over all clients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fedmira.messages import ClientId
from fedmira.metrics import LOSS_METRICS, TEXT_METRICS, TokenLoss, metrics, summarise
from fedmira.runs.recorder import Recorder

__all__ = ["ClientRow", "client_rows", "finite_figures", "summary_of"]

ClientRow = dict[str, str | int | float | None]
"""A row of metrics/clients.csv, column -> value; None where nothing was measured."""


def client_rows(
    recorder: Recorder,
    ranks: Mapping[ClientId, int],
    losses: Mapping[str, Mapping[ClientId, TokenLoss]],
    texts: Mapping[ClientId, Mapping[str, float]],
) -> list[ClientRow]:
    """The rows of metrics/clients.csv, which all have the same columns.

    Args:
        recorder: what was measured during the run.
        ranks: of each client's adapter; also the order of the rows.
        losses: name of a loss metric -> client -> its loss, without clients that have none.
        texts: client -> name of a text metric -> its mean over the client's test rows.
    """
    return [
        _client_row(recorder, client, rank, losses, texts.get(client, {}))
        for client, rank in ranks.items()
    ]


def finite_figures(row: ClientRow) -> dict[str, float]:
    """Name -> value of the metrics that were measured and are finite, in the order of the table."""
    found = {metric.name: row[metric.name] for metric in metrics()}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def summary_of(rows: Sequence[ClientRow]) -> dict[str, dict[str, float]]:
    """Metric -> its statistics over the clients whose figure is finite.

    Metrics that no client has are left out.
    """
    figures = [finite_figures(row) for row in rows]
    summary = {}
    for metric in metrics():
        values, weights = [], []
        for row, found in zip(rows, figures, strict=True):
            weight = row[metric.weight]
            if metric.name in found and isinstance(weight, int):
                values.append(found[metric.name])
                weights.append(weight)
        if values:
            summary[metric.name] = summarise(
                values, weights, higher_is_better=metric.higher_is_better
            )
    return summary


def _client_row(
    recorder: Recorder,
    client: ClientId,
    rank: int,
    losses: Mapping[str, Mapping[ClientId, TokenLoss]],
    texts: Mapping[str, float],
) -> ClientRow:
    party = recorder.clients.parties[client]
    best = recorder.best.get(client)
    return {
        "client": client,
        "task": party.task,
        "category": party.category,
        "rank": rank,
        "train_rows": party.train_rows,
        "test_rows": party.test_rows,
        "test_tokens": party.test_response_tokens,
        "rounds_trained": recorder.rounds_trained.get(client, 0),
        **{
            name: losses[name][client].per_token if client in losses[name] else None
            for name in LOSS_METRICS
        },
        "best_round": best.round if best else None,
        "best_validation_loss": best.validation_loss if best else None,
        "best_test_loss": best.test_loss if best else None,
        **{name: texts.get(name) for name in TEXT_METRICS},
    }
