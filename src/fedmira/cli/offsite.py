"""fedmira emulate and plug: adapters for a base that its clients do not have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmira.cli.options import Format, FormatOption, RunPath, names_of
from fedmira.cli.screen import print_json, print_table, say, tell

__all__ = ["emulate", "plug"]


def emulate(
    base: Annotated[str, typer.Argument(metavar="BASE", help="As model.base takes it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    left: Annotated[int, typer.Option("--left", help="First layers that stay.")] = 2,
    right: Annotated[int, typer.Option("--right", help="Last layers that stay.")] = 2,
    drop: Annotated[
        float, typer.Option("--drop", help="Share of the layers between them that is left out.")
    ] = 0.5,
    targets: Annotated[
        str,
        typer.Option("--targets", help="Layers that carry adapters, as in adapter.targets."),
    ] = "",
    format: FormatOption = Format.text,
) -> None:
    """Write a base with a thinned middle, for clients who are not to have the base itself.

    They train adapters in its outer layers; `fedmira plug` puts these on the base.

    Example: fedmira emulate bundled --left 1 --right 1 --drop 0.5 --output emulator
    """
    from fedmira.studies.offsite import emulate as made

    found = made(base, output, left=left, right=right, drop=drop, targets=tuple(names_of(targets)))
    if format is Format.json:
        print_json(found.figures)
        return
    kept = found.emulator
    say(
        f"layers {', '.join(map(str, kept.layers))} of {kept.count}; {found.parameters:,} of "
        f"{found.of:,} parameters; read back, it says what the base without the others says"
    )
    say("a run on it trains both ends with:")
    say(f"  --set model.base={found.folder} --set '{found.setting}'")
    tell(found.folder)


def plug(
    run: RunPath,
    base: Annotated[str, typer.Option("--base", help="The base that the emulator was made of.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="A new folder for the adapters on the base.", show_default=False
        ),
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Put the adapters of a run on an emulator back on its base, and measure both.

    Example: fedmira plug runs/offsite --base bundled --output plugged
    """
    from fedmira.records import check_new
    from fedmira.studies.offsite import COLUMNS, plug_run
    from fedmira.studies.saved import reload_adapters

    if output is not None:
        check_new(output)
    found = plug_run(reload_adapters(run), base)
    if output is not None:
        found.save(output)
    if format is Format.json:
        print_json({**found.figures, "output": None if output is None else str(output)})
        return
    if found.losses:
        lines = [[client, *line.values()] for client, line in found.losses.items()]
        lines.append(["mean", *found.means.values()])
        print_table("test loss, nats per response token", ["client", *COLUMNS], lines)
    for note in found.notes:
        say(f"note: {note}")
    if output is not None:
        tell(output)
