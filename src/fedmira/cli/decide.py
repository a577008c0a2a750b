"""fedmira decide: for each client the adapter that its own validation rows can show to be best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmira.cli.options import (
    Format,
    FormatOption,
    OutputFolder,
    Overrides,
    PresetName,
    fresh_folder,
    is_rows,
    settings_and_rows,
)
from fedmira.cli.screen import print_json, print_table, progress, say, tell
from fedmira.errors import ConfigError

if TYPE_CHECKING:
    from fedmira.studies import Decision

__all__ = ["decide"]

_SHARES = ("data.train_fraction=0.6", "data.validation_fraction=0.2")
"""Where only rows are given: some must judge."""
_OF_RUNS = ("config.toml", "run.json", "comparison.json", "hashes.sha256", "checkpoint")


def decide(
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="[COMPARISON | RUN | CONFIG.toml | ROWS]",
            help="The folder of a comparison or of a run; or settings, or a folder or file of "
            "rows: with these, --preset and --set the runs are made first.",
            show_default=False,
        ),
    ] = None,
    preset: PresetName = None,
    overrides: Overrides = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            help="Which runs of a comparison; the lowest seed by default.",
            show_default=False,
        ),
    ] = None,
    mixes: Annotated[
        bool,
        typer.Option(
            "--mixes/--no-mixes",
            help="Whether half of a client's own adapter and half of another is judged, too.",
        ),
    ] = True,
    output: OutputFolder = None,
    format: FormatOption = Format.text,
) -> None:
    """Decide for each client whether it trains with the others, and write the adapter it takes.

    Its own validation rows judge; where they are too few to tell, it keeps what it trained alone.

    Example: fedmira decide runs/demo
    """
    from_folder = target is not None and target.is_dir() and _holds_runs(target)
    if target is not None and not target.exists():
        raise ConfigError(
            f"{target}: there is neither such a folder, of a comparison, a run or rows, nor such "
            "a file; settings can also be given with --preset and --set"
        )
    if from_folder and (preset or overrides):
        raise ConfigError(
            f"{target} is a folder whose runs are made; leave --preset and --set away, or give "
            "settings in its place"
        )
    if seed is not None and not from_folder:
        raise ConfigError("--seed chooses among the runs of a comparison; set it by --set seed=N")
    rows = None
    if not from_folder:
        if is_rows(target) and not any(
            each.startswith(("data.validation_fraction", "data.train_fraction"))
            for each in overrides or []
        ):
            overrides = [*_SHARES, *(overrides or [])]
            say(
                "of each client's rows 60 % train, 20 % judge and 20 % test, but for files that "
                "are one of these; --set data.train_fraction=... and data.validation_fraction=... "
                "take other shares"
            )
        chosen, rows = settings_and_rows(target, preset, overrides)
        output = output or fresh_folder("decide")
    from fedmira.studies import decide as decided

    if not from_folder:
        say(f"training what is compared, into {output}")
    found = decided(
        target if from_folder and target else chosen,
        output,
        seed=seed,
        mixes=mixes,
        observers=[progress()],
        rows=rows,
    )
    if format is Format.json:
        told = {"folder": str(found.folder), "report": str(found.page)}
        print_json(told | found.decisions.document())
        return
    _print(found)


def _holds_runs(folder: Path) -> bool:
    """Whether a folder is that of a run or of a comparison, also of one that is damaged."""
    return any((folder / name).exists() for name in _OF_RUNS) or any(folder.glob("*/config.toml"))


def _print(found: Decision) -> None:
    """The table for people."""
    rows = [one.row() for one in found.decisions.clients]
    columns = {
        "client": "client",
        "standing": "together is",
        "choice": "takes",
        "validation_rows": "rows",
        "difference": "expected",
        "margin": "margin",
        "own_test_loss": "test loss alone",
        "chosen_test_loss": "as decided",
    }
    cells = [["" if row[key] is None else row[key] for key in columns] for row in rows]
    print_table("decisions", list(columns.values()), cells)
    document = found.decisions.document()
    tell(document["rule"])
    for note in document["notes"]:
        tell(note)
    measured = document["measured"]
    if measured and not found.decisions.taken:
        tell(f"Everybody keeps its own adapter: {measured['own_test_loss']:.3f} on test rows.")
    elif measured:
        tell(
            f"On test rows: {measured['own_test_loss']:.3f} all alone, "
            f"{measured['chosen_test_loss']:.3f} as decided, difference "
            f"{measured['difference']:+.3f} (95 % interval {measured['low']:+.3f} to "
            f"{measured['high']:+.3f}); {measured['below']} of {measured['clients']} clients more "
            f"than 2 % below what they reach alone, {measured['above']} above."
        )
    tell(f"adapters: {found.folder / 'adapters'}")
    tell(f"report: {found.page}")
