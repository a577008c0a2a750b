"""fedmira merge, compress and align: adapters that exist already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmira.cli.options import Format, FormatOption, Overrides
from fedmira.cli.screen import print_json, print_table, say, tell
from fedmira.errors import ConfigError

if TYPE_CHECKING:
    from fedmira.fleet import Fleet

__all__ = ["align", "compress", "merge"]

Folders = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN_OR_FOLDERS",
        help="A run folder, or folders of adapters that plain PEFT loads; NAME=FOLDER gives one "
        "another name.",
    ),
]
NewFolder = Annotated[Path, typer.Option("--output", "-o", help="A new folder for the result.")]
BaseName = Annotated[
    str,
    typer.Option(
        "--base",
        help="What the base of all of them is, where their own names of it differ.",
        show_default=False,
    ),
]


def merge(
    folders: Folders,
    output: NewFolder,
    by: Annotated[
        str, typer.Option("--by", help="metagpt, rows, uniform, ties or precision.", metavar="WAY")
    ] = "metagpt",
    strength: Annotated[
        str,
        typer.Option(
            "--strength",
            metavar="C",
            help="What the sum is multiplied by; auto: 1, 2, 4 or 8, by a run's validation rows.",
        ),
    ] = "1",
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Default: the largest of all.", show_default=False),
    ] = None,
    keep: Annotated[
        float, typer.Option("--keep", help="Share of the entries that ties keeps.")
    ] = 0.2,
    base: BaseName = "",
    format: FormatOption = Format.text,
) -> None:
    """Make one adapter of several: a plain PEFT folder with a card.

    Example: fedmira merge runs/first --by metagpt --strength auto --output merged
    """
    from fedmira.api import fleets

    made = fleets.merge(
        _places(folders),
        by=by,
        strength=_number(strength),
        rank=rank,
        keep=keep,
        base=base,
        output=output,
    )
    if format is Format.json:
        print_json({**made.figures, "output": str(output)})
        return
    if made.weights is not None:
        rows = [list(pair) for pair in zip(made.clients, made.weights, strict=True)]
        print_table(f"merged by {made.by}", ["adapter", "weight"], rows)
    for c, loss in made.tried.items():
        tell(f"strength {c:g}: mean validation loss {loss:.4f}{' *' * (c == made.strength)}")
    share = made.tail / (made.norm**2 + made.tail**2) ** 0.5 if made.tail else 0.0
    tell(f"rank {made.rank}, strength {made.strength:g}; the cut left out {100 * share:.2g} %")
    _assume(made.fleet)
    tell(f"written: {output}")


def compress(
    folders: Folders,
    output: NewFolder,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", min=0, help="Most directions that a layer keeps.", show_default=False
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy",
            help="Share of the squared norm that is kept, such as 0.95.",
            show_default=False,
        ),
    ] = None,
    around: Annotated[
        str | None,
        typer.Option(
            "--around",
            metavar="WAY",
            help="Keep one adapter merged by uniform or metagpt for all, and each one's residual.",
            show_default=False,
        ),
    ] = None,
    joined: Annotated[
        bool,
        typer.Option(
            "--joined", help="With --around, write each adapter in one piece too, of rank R + q."
        ),
    ] = False,
    base: BaseName = "",
    format: FormatOption = Format.text,
) -> None:
    """Cut adapters to fewer directions; each stays the nearest to what it was.

    Example: fedmira compress runs/first --rank 4 --output small
    """
    from fedmira.api import fleets

    if joined and around is None:
        raise ConfigError(
            "compress: --joined puts merged adapter and residual together; give --around"
        )
    made = fleets.compress(
        _places(folders),
        rank=rank,
        energy=energy,
        around=around,
        joined=joined,
        base=base,
        output=output,
    )
    figures: dict[str, Any] = made.figures
    if format is Format.json:
        print_json({**figures, "output": str(output)})
        return
    columns = ["name", "rank_before", "rank", "bytes_before", "bytes", "error", "energy_kept"]
    rows = [[row[column] for column in columns] for row in figures["adapters"]]
    print_table("compressed", [column.replace("_", " ") for column in columns], rows)
    common = f" ({figures['bytes_common']:,} of them for all)" if around else ""
    tell(f"{figures['bytes_before']:,} bytes before, {figures['bytes_after']:,} after{common}")
    if made.assumed:
        say(f"note: {made.assumed}")
    tell(f"written: {output}; no loss was measured")


def align(
    folders: Folders,
    output: NewFolder,
    rows: Annotated[
        Path | None,
        typer.Option(
            "--rows",
            help="A folder with a few validation rows of each owner, as NAME.jsonl or NAME/; or "
            "the run, for those of its clients.",
            show_default=False,
        ),
    ] = None,
    coupling: Annotated[
        float | None,
        typer.Option(
            "--coupling",
            help="Most of the way to its neighbours' mean that an adapter goes. Default: 0.5; with "
            "--rows 1.",
            show_default=False,
        ),
    ] = None,
    nearest: Annotated[
        int, typer.Option("--nearest", min=1, help="Neighbours that each adapter chooses.")
    ] = 3,
    base: BaseName = "",
    overrides: Overrides = None,
    format: FormatOption = Format.text,
) -> None:
    """Move adapters that were trained apart towards those that learned something like them.

    Example: fedmira align adapters/* --rows validation --output aligned
    """
    from fedmira.api import fleets

    made = fleets.align(
        _places(folders),
        rows=rows,
        coupling=coupling,
        nearest=nearest,
        base=base,
        settings=overrides or [],
        output=output,
    )
    figures = made.figures
    if format is Format.json:
        print_json({**figures, "output": str(output)})
        return
    columns = ["name", "takes", "pull", "distance"]
    judged = ["rows", "own_loss", "difference", "margin"] if figures["judged"] else []
    table = [
        ["" if row[name] is None else row[name] for name in (*columns, *judged)]
        for row in figures["adapters"]
    ]
    print_table("aligned", [name.replace("_", " ") for name in (*columns, *judged)], table)
    tell(figures["bound"])
    for text in figures["unknown"]:
        tell(f"not known: {text}")
    tell(f"written: {output}, with graph.json and report.html")


def _places(folders: list[str]) -> list[str] | dict[str, str]:
    """Folders, or names and folders where one is given a name.

    Raises:
        ConfigError: a name is given twice, or to nothing.
    """
    pairs = [_named(text) for text in folders]
    if not any(name for name, _ in pairs):
        return folders
    named: dict[str, str] = {}
    for given, folder in pairs:
        name = given or Path(folder).resolve().name
        if not folder or name in named:
            what = f"and {named[name]} both have this name" if folder else "names no folder"
            raise ConfigError(f"{name}={folder}: {what}; give each folder a name as NAME=FOLDER")
        named[name] = folder
    return named


def _named(text: str) -> tuple[str, str]:
    name, sign, folder = text.partition("=")
    return (name, folder) if sign and name and not Path(text).exists() else ("", text)


def _number(text: str) -> Any:
    """A strength: a number, or a word that is judged elsewhere."""
    try:
        return float(text)
    except ValueError:
        return text


def _assume(fleet: Fleet) -> None:
    if fleet.assumed:
        say(f"note: {fleet.assumed}")
