"""fedmira tune: settings chosen by validation loss."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmira.cli.options import (
    ConfigFile,
    Format,
    FormatOption,
    Observers,
    OutputFolder,
    Overrides,
    PresetName,
    fresh_folder,
    names_of,
    numbers_of,
    observers_of,
    seeds_of,
    settings,
    settings_and_rows,
)
from fedmira.cli.screen import print_json, print_table, progress, say, tell
from fedmira.errors import ConfigError

if TYPE_CHECKING:
    from fedmira.studies import Tuning

__all__ = ["tune"]


class _Method(StrEnum):
    """How a space is searched."""

    halving = "halving"
    random = "random"
    tpe = "tpe"
    exponentiated = "exponentiated"


class _Divisor(StrEnum):
    """What the steps of exponentiated are divided by."""

    aggressive = "aggressive"
    adaptive = "adaptive"
    auto = "auto"
    constant = "constant"


class _At(StrEnum):
    """Which round of a client counts."""

    last = "last"
    best = "best"


def tune(
    config: ConfigFile = None,
    preset: PresetName = None,
    overrides: Overrides = None,
    space: Annotated[
        Path | None,
        typer.Option(
            "--space",
            metavar="SPACE.toml",
            help="What is searched: keys -> lists of values, or {low, high, log}. Default: the "
            "learning rate times 1/4 to 4, and the method's main settings.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        _Method,
        typer.Option("--method", help="How it is searched; tpe needs pip install 'fedmira[tune]'."),
    ] = _Method.halving,
    trials: Annotated[int, typer.Option("--trials", help="How many settings are tried.")] = 9,
    algorithms: Annotated[
        str,
        typer.Option(
            "--algorithms",
            help="Tune each of these, separated by commas, into OUTPUT/<name>; see compare "
            "--tuned. Default: the config's.",
            show_default=False,
        ),
    ] = "",
    seeds: Annotated[
        str,
        typer.Option(
            "--seeds",
            help="Seeds of each trial's runs, separated by commas. Default: the config's.",
            show_default=False,
        ),
    ] = "",
    at: Annotated[
        _At | None,
        typer.Option(
            "--at",
            help="Each client's validation loss after the last round, or at its own best one. "
            "Default: evaluation.select, which is last.",
            show_default=False,
        ),
    ] = None,
    rate: Annotated[int, typer.Option("--rate", help="Halving keeps one of so many.")] = 3,
    budgets: Annotated[
        str,
        typer.Option(
            "--budgets",
            help="Halving: the last round of each stage, such as 3,7,20. Default: from --rate.",
            show_default=False,
        ),
    ] = "",
    divisor: Annotated[
        _Divisor,
        typer.Option(
            "--divisor",
            help="Exponentiated: what a step of the settings' weights is divided by; see "
            "docs/tuning.md.",
        ),
    ] = _Divisor.aggressive,
    output: OutputFolder = None,
    observer: Observers = None,
    format: FormatOption = Format.text,
) -> None:
    """Choose settings by validation loss. Run again with the same --output to continue.

    Example: fedmira tune --set data.validation_fraction=0.2 --seeds 5,6 --output runs/tuned
    """
    numbers = seeds_of(seeds) if seeds else []
    if output is not None and output.is_dir():  # perhaps finished: then no row is needed
        chosen, rows = settings(config, preset, overrides), None
    else:
        first = numbers[0] if numbers else None
        chosen, rows = settings_and_rows(config, preset, overrides, first)
    names = names_of(algorithms)
    if algorithms and not names:
        raise ConfigError(f"--algorithms {algorithms!r}: names none; leave it out for the config's")
    watchers = observers_of(observer)
    from fedmira.studies import Search, tune_methods, tune_settings

    search = Search(
        method=method.value,
        trials=trials,
        seeds=tuple(numbers),
        at=at.value if at is not None else "",
        rate=rate,
        budgets=tuple(numbers_of("--budgets", budgets)),
        divisor=divisor.value,
    )
    folder = output or fresh_folder("tune")
    say(f"tuning {', '.join(names) or chosen.algorithm.name} by {method.value}, into {folder}")
    watching = [progress(), *watchers]
    if names:
        found = tune_methods(chosen, names, space, search, folder, watching, rows=rows)
    else:
        one = tune_settings(chosen, space, search, folder, watching, rows=rows)
        found = {chosen.algorithm.name: one}
    if format is Format.json:
        documents = {name: _document(tuning) for name, tuning in found.items()}
        print_json(documents if names else documents[chosen.algorithm.name])
        return
    for tuning in found.values():
        _print(tuning)


def _document(tuning: Tuning) -> dict[str, object]:
    return {"folder": str(tuning.folder), "page": str(tuning.page), **tuning.document}


def _print(tuning: Tuning) -> None:
    """The table for people."""
    document, rows = tuning.document, tuning.rows
    columns = {key: key for key in rows[0] if key not in ("status", "low", "high")}
    if len(document["seeds"]) == 1:
        del columns["spread"]
    cells = [["" if row[key] is None else row[key] for key in columns] for row in rows]
    print_table(
        f"{document['algorithm']}: validation loss per response token, {document['at']} round",
        list(columns),
        cells,
    )
    for trial in document["trials"]:
        if trial["problem"]:
            tell(f"trial {trial['number']} failed: {trial['problem']}")
    others = len(rows) - 1
    if document["close"]:
        tell(
            f"{len(document['close'])} of {others} other trials are not told apart from the best: "
            f"{', '.join(map(str, document['close']))}"
        )
    for note in [*document["edges"], *document["notes"]]:
        tell(note)
    tell(f"best settings: {tuning.folder / 'best.toml'}")
    tell(f"page: {tuning.page}")
