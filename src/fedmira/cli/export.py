"""fedmira export: a client's adapter, or base and adapter as one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmira.cli.options import Format, FormatOption, RunPath
from fedmira.cli.screen import print_json, say, tell

__all__ = ["export"]


def export(
    run: RunPath,
    client: Annotated[str, typer.Option("--client", help="Whose adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    merged: Annotated[
        bool,
        typer.Option(
            "--merged",
            help="Write a whole Hugging Face model: the base with the adapter in its weights.",
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="float32, bfloat16 or float16. Default: float32 for an adapter, and that in "
            "which the run computed for a model.",
            show_default=False,
        ),
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Write a client's adapter as a PEFT folder, or merged with its base, and prove it.

    What was written is read back, and its logits are held against those of base and adapter.

    Example: fedmira export runs/first --client clinic-north --merged --output clinic-north-model
    """
    from fedmira.studies.saved import reload_adapters
    from fedmira.studies.serving.exported import export_adapter

    found = export_adapter(reload_adapters(run), client, output, merged=merged, dtype=dtype)
    if format is Format.json:
        print_json(found.about)
        return
    for line in found.lines():
        say(line)
    tell(found.folder)
