"""fedmira serve-config: what servers need to offer a run's adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmira.cli.options import Format, FormatOption, RunPath
from fedmira.cli.screen import print_json, say, tell

__all__ = ["serve_config"]


def serve_config(
    run: RunPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    client: Annotated[
        list[str] | None,
        typer.Option("--client", help="Whose adapters; may be repeated. Default: all."),
    ] = None,
    base: Annotated[
        str,
        typer.Option(
            "--base",
            help="The folder or hub id under which the servers find the base. Default: where it "
            "lies here, or its published name.",
            show_default=False,
        ),
    ] = "",
    format: FormatOption = Format.text,
) -> None:
    """Write adapters, chat template and commands for vLLM, llama.cpp, Ollama and PEFT.

    Each file is parsed as its reader does; no server is started.

    Example: fedmira serve-config runs/first --output serve
    """
    from fedmira.studies.saved import reload_adapters
    from fedmira.studies.serving.served import write_served

    found = write_served(reload_adapters(run), output, clients=client or (), base=base)
    if format is Format.json:
        print_json(
            {"folder": str(found.folder), "files": list(found.files), "notes": list(found.notes)}
        )
        return
    for note in found.notes:
        say(note)
    say(f"{len(found.files)} files; {found.folder / 'README.md'} says how to use them")
    tell(found.folder)
