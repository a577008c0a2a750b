"""fedmira route: which client's adapter should answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmira.cli.options import Format, FormatOption, RunPath
from fedmira.cli.screen import print_json, print_table, say
from fedmira.errors import ConfigError

__all__ = ["route"]


def route(
    run: RunPath,
    text: Annotated[str | None, typer.Argument(help="A request.", show_default=False)] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            "--rows",
            help="In place of a text: a file with a few rows and their answers, as data.path "
            "takes them.",
            show_default=False,
        ),
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Rank the clients of a run by how well their adapters know a text, or a few rows.

    Rows with answers tell far more than a text: docs/serving.md has the accuracy of both.

    Example: fedmira route runs/first --rows few.jsonl
    """
    from fedmira.data import rows_of_file
    from fedmira.studies.saved import reload_adapters
    from fedmira.studies.serving.routing import Router

    if (text is None) == (rows is None):
        raise ConfigError("route: give a text or --rows FILE, and not both")
    if rows is not None and not rows.is_file():
        raise ConfigError(f"--rows {rows}: there is no such file")
    saved = reload_adapters(run)
    router = Router(saved)
    if rows is not None:
        scores = router.by_rows(rows_of_file(rows, saved.config.data))
    else:
        scores = router.by_text(text or "")
    table = [
        {
            "client": score.client,
            "loss": score.loss,
            "above_best": score.loss - scores[0].loss,
            "tokens": score.tokens,
        }
        for score in scores
    ]
    if format is Format.json:
        print_json(table)
        return
    print_table(str(run), list(table[0]), [list(row.values()) for row in table])
    if rows is None:
        say("a text alone tells little: see docs/serving.md; give --rows where there are any")
