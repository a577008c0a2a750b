"""fedmira verify: whether a folder still holds what was written into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmira.cli.options import Format, FormatOption
from fedmira.cli.screen import print_json, say, tell
from fedmira.errors import RunFolderError

__all__ = ["verify"]

_SHOWN = 20


def verify(
    folder: Annotated[
        Path, typer.Argument(help="A folder that a verb wrote, or one that holds run folders.")
    ],
    accept: Annotated[
        list[str] | None,
        typer.Option(
            "--accept",
            help="Record a file as it is now, since you changed it yourself; may be repeated. "
            "Names are relative to FOLDER; all: every file outside the checkpoints.",
        ),
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Compare every file of a run with its hash: adapters, checkpoints, tables and the rest.

    Exit code 0 where nothing is damaged, 2 where something is. Nothing is changed, but for files
    that are accepted.

    Example: fedmira verify runs/first
    """
    from fedmira.runs import accept_files, verify_folder

    if accept:
        say(f"{folder}: recorded as they are now: {', '.join(accept_files(folder, accept))}")
    found = verify_folder(folder)
    if format is Format.json:
        print_json(
            {
                "folder": str(folder),
                "checked": found.checked,
                "damaged": found.damaged,
                "unchecked": found.unchecked,
            }
        )
    else:
        tell(f"{folder}: {len(found.checked)} files are as they were written")
        for name, reason in list(found.unchecked.items())[:_SHOWN]:
            tell(f"cannot be checked: {name}: {reason}")
        if len(found.unchecked) > _SHOWN:
            tell(f"and {len(found.unchecked) - _SHOWN} more; --format json lists all")
    if found.damaged:
        raise RunFolderError(found.damaged)
