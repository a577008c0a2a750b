"""fedmira run: one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedmira.cli.options import ConfigFile, Format, FormatOption, OutputFolder, Overrides, PresetName, fresh_folder, settings
from fedmira.cli.screen import print_json, print_table, say, show_progress
from fedmira.errors import ConfigError

__all__ = ["print_summary", "run"]


def run(
    config: ConfigFile = None,
    preset: PresetName = None,
    overrides: Overrides = None,
    output: OutputFolder = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output from its last checkpoint.")] = False,
    format: FormatOption = Format.text,
) -> None:
    """Run a federation: every client ends with an adapter of its own.

    Example: fedmira run --set data.source=jsonl --set data.path=my-clients --output runs/first
    """
    if resume:
        config = _resumed_config(config, preset, overrides, output)
    chosen = settings(config, preset, overrides)
    from fedmira.experiment import build_experiment, resume_experiment, run_experiment

    folder = output or fresh_folder(chosen.algorithm.name)
    experiment = build_experiment(chosen, resumed=folder if resume else None)
    for note in experiment.skipped:
        say(f"left out: {note}")
    say(f"{chosen.algorithm.name} on {len(experiment.ranks)} clients, {chosen.rounds.count} rounds, into {folder}")
    start = resume_experiment if resume else run_experiment
    with show_progress(chosen.algorithm.name, chosen.rounds.count) as progress:
        result = start(experiment, folder, progress)
    if format is Format.json:
        print_json({"folder": str(folder), "report": str(result.report), "summary": result.summary, "clients": result.clients})
        return
    print_summary(chosen.algorithm.name, result.summary)
    print(f"report: {result.report}")


def print_summary(title: str, summary: Any) -> None:
    """The headline figures of a run as a table."""
    columns = ["figure", "mean over clients", "weighted mean", "worst tenth", "spread"]
    print_table(
        title,
        columns,
        [[name, *(values[key] for key in ("mean", "weighted_mean", "worst_tenth", "spread"))] for name, values in summary.items()],
    )


def _resumed_config(config: Path | None, preset: str | None, overrides: list[str] | None, output: Path | None) -> Path:
    if output is None:
        raise ConfigError("--resume needs --output: the folder of the run to continue")
    if config is not None or preset is not None or overrides:
        raise ConfigError("--resume continues a run as it was; leave the config, --preset and --set away")
    from fedmira.rounds import RunFolder

    return RunFolder.reopen(output).path / "config.toml"
