"""fedmira evaluate: measure the saved adapters of a run again."""

from __future__ import annotations

from dataclasses import asdict

from fedmira.cli.options import Format, FormatOption, RunPath
from fedmira.cli.screen import print_json, print_table, progress
from fedmira.observers import MeasuringEvent, RunFacts

__all__ = ["evaluate"]


def evaluate(run: RunPath, format: FormatOption = Format.text) -> None:
    """Load each client's saved adapter and measure its own test loss and Rouge-L.

    Example: fedmira evaluate runs/first
    """
    from fedmira.studies.saved import clients_of, reload_adapters

    saved = reload_adapters(run)
    clients = clients_of(saved)
    screen, facts = progress(run.name), RunFacts("", run.name, {})
    clients.heard = lambda measuring: screen.on_measuring(
        MeasuringEvent(run=facts, **asdict(measuring))
    )
    losses = clients.losses(saved.adapters)
    texts = (
        clients.score(saved.adapters, saved.config.evaluation.max_new_tokens)
        if saved.config.evaluation.rouge
        else {}
    )
    rows = [
        {"client": client, "test_loss": loss.per_token, **texts.get(client, {})}
        for client, loss in losses.items()
    ]
    if format is Format.json:
        print_json(rows)
        return
    print_table(str(run), list(rows[0]), [list(row.values()) for row in rows])
