"""fedmira join: a newcomer to a run that is over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmira.cli.options import Format, FormatOption, Overrides, RunPath
from fedmira.cli.screen import print_json, print_table, say, tell

__all__ = ["join"]


def join(
    run: RunPath,
    client: Annotated[str, typer.Option("--client", help="What the newcomer is called.")],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="Its rows: a file, or a folder with train.jsonl and perhaps test.jsonl, in the "
            "shapes that data.path takes.",
        ),
    ],
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            help="Local steps; 0 keeps the start as it is. Default: 10.",
            show_default=False,
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            metavar="WAY",
            help="generalist, nearest, mix or fresh, in place of what the rows choose.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A new folder. Default: beside the run, with the client's name behind the run's.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    format: FormatOption = Format.text,
) -> None:
    """Give a newcomer with a few rows an adapter that starts from those of a run.

    The run is not changed. The newcomer's rows score its adapters, choose a start, and train.

    Example: fedmira join runs/first --client clinic-west --data west.jsonl --steps 10
    """
    from fedmira.studies.joining import join_run

    made = join_run(run, client, data, output, steps=steps, start=start, settings=overrides or [])
    figures = made.figures
    if format is Format.json:
        print_json({**figures, "output": str(made.folder)})
        return
    columns = ["client", "loss", "behind", "error"]
    nearest = [[each[name] for name in columns] for each in figures["resembles"][:5]]
    print_table("adapters of the run on the newcomer's rows", columns, nearest)
    if figures["tried"]:
        ways = ["start", "loss_of_start", "loss_trained"]
        lines = [[each[name] for name in ways] for each in figures["tried"]]
        print_table("on rows that neither chose nor trained", ways, lines)
    made_of = ", ".join(f"{name} {share:.2g}" for name, share in figures["start_weights"].items())
    kept = "" if figures["steps"] else ", kept as it is"
    tell(f"starts from: {figures['start']}{f' ({made_of})' if made_of else ''}{kept}")
    if figures["held_out"]:
        told = ", ".join(f"{name} {loss:.4f}" for name, loss in figures["held_out"].items())
        tell(f"on {figures['rows']['held_out']} rows that were set aside: {told}")
    for note in figures["notes"]:
        say(f"note: {note}")
    tell(f"written: {made.folder}, with join.json and join.html")
