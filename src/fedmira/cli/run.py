"""fedmira run: one run."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

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
    observers_of,
    settings,
    settings_and_rows,
)
from fedmira.cli.screen import print_json, print_table, progress, say, tell
from fedmira.config import load_config, refuse_federation
from fedmira.errors import ConfigError

__all__ = ["print_summary", "run"]

_NAMES = ("client", "task", "category")
"""Columns of clients.csv that hold text."""


def run(
    config: ConfigFile = None,
    preset: PresetName = None,
    overrides: Overrides = None,
    output: OutputFolder = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in --output from its last checkpoint."),
    ] = False,
    observer: Observers = None,
    verify_adapters: Annotated[
        bool,
        typer.Option(
            "--verify-adapters",
            help="Load every saved adapter with plain PEFT and compare its loss, not one alone.",
        ),
    ] = False,
    format: FormatOption = Format.text,
) -> None:
    """Run a federation: every client ends with an adapter of its own.

    Example: fedmira run --set data.source=jsonl --set data.path=my-clients --output runs/first
    """
    if resume:
        config = _resumed_config(config, preset, overrides, output)
        if _told_finished(config.parent, format):
            return
        chosen, rows = settings(config, preset, overrides), None  # read where they lay then
    else:
        chosen, rows = settings_and_rows(config, preset, overrides)
    refuse_federation(chosen)
    watchers = observers_of(observer)
    folder = output or fresh_folder(chosen.algorithm.name)
    from fedmira.experiment import build_experiment, start_experiment
    from fedmira.runs import RunFolder

    if not resume:
        RunFolder.refuse_taken(folder)
    experiment = build_experiment(chosen, resumed=folder if resume else None, rows=rows)
    experiment = replace(experiment, verify_adapters=verify_adapters)
    say(
        f"{chosen.algorithm.name} on {len(experiment.ranks)} clients, "
        f"{chosen.rounds.count} rounds, into {folder}"
    )
    shown = [progress(chosen.algorithm.name), *watchers]
    result = start_experiment(experiment, folder, shown, resume=resume)
    if format is Format.json:
        print_json(
            {
                "folder": str(folder),
                "report": str(result.report),
                "summary": result.summary,
                "clients": result.clients,
            }
        )
        return
    print_summary(chosen.algorithm.name, result.summary)
    tell(f"report: {result.report}")


def print_summary(title: str, summary: Any) -> None:
    """The headline figures of a run as a table."""
    columns = ["figure", "mean over clients", "weighted mean", "worst tenth", "spread"]
    print_table(
        title,
        columns,
        [
            [name, *(values[key] for key in ("mean", "weighted_mean", "worst_tenth", "spread"))]
            for name, values in summary.items()
        ],
    )


def _resumed_config(
    config: Path | None, preset: str | None, overrides: list[str] | None, output: Path | None
) -> Path:
    if output is None:
        raise ConfigError("--resume needs --output: the folder of the run to continue")
    if any(override.partition("=")[0].strip() == "rounds.count" for override in overrides or []):
        raise ConfigError(
            "--resume cannot make a run longer or shorter; start a new one with the "
            "settings of this one: "
            f"fedmira run {output / 'config.toml'} --set rounds.count=N --output NEW"
        )
    if config is not None or preset is not None or overrides:
        raise ConfigError(
            "--resume continues a run as it was; leave the config, --preset and --set away"
        )
    from fedmira.runs import RunFolder

    return RunFolder.reopen(output).path / "config.toml"


def _told_finished(folder: Path, format: Format) -> bool:
    """Of a finished run, say so and print what it found.

    False where there is something left to do, or a file of its results is gone.
    """
    from fedmira.runs import RunFolder

    run: Any = RunFolder(folder).run_json()
    table, page = folder / "metrics" / "clients.csv", folder / "report.html"
    if run.get("status") != "finished" or not all(
        path.is_file() for path in (table, page, folder / "adapters" / "index.json")
    ):
        return False
    if damaged := RunFolder(folder).damaged_results():
        for problem in damaged:
            say(f"warning: {problem}")
        say("results are written again from the checkpoint")
        return False
    say(
        f"{folder}: already finished, {run['rounds_done']} of {run['rounds_done']} rounds; "
        "nothing to do"
    )
    if format is Format.json:
        with table.open(encoding="utf-8", newline="") as file:
            clients = [
                {name: cell if name in _NAMES else _number(cell) for name, cell in row.items()}
                for row in csv.DictReader(file)
            ]
        print_json(
            {
                "folder": str(folder),
                "report": str(page),
                "summary": run["summary"],
                "clients": clients,
            }
        )
        return True
    print_summary(load_config(folder / "config.toml").algorithm.name, run["summary"])
    tell(f"report: {page}")
    return True


def _number(cell: str) -> int | float | None:
    """A number of clients.csv; None for an empty cell."""
    if not cell:
        return None
    return int(cell) if cell.isdigit() else float(cell)
