"""fedmira compare: the same data, seeds and budget for several algorithms."""

from __future__ import annotations

from typing import Annotated

import typer

from fedmira.cli.options import ConfigFile, Format, FormatOption, OutputFolder, Overrides, PresetName, fresh_folder, settings
from fedmira.cli.screen import print_json, print_table, say, show_progress
from fedmira.errors import ConfigError

__all__ = ["compare"]


def compare(
    algorithms: Annotated[str, typer.Option("--algorithms", help="Names, separated by commas.")],
    config: ConfigFile = None,
    preset: PresetName = None,
    overrides: Overrides = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Run seeds, separated by commas.")] = "0",
    output: OutputFolder = None,
    format: FormatOption = Format.text,
) -> None:
    """Compare algorithms on equal data, seeds and steps. Run again with the same --output to continue.

    Example: fedmira compare --algorithms local,fedavg,mira --output runs/demo
    """
    chosen = settings(config, preset, overrides)
    numbers = _seeds(seeds)
    names = [name.strip() for name in algorithms.split(",") if name.strip()]
    if not names:
        raise ConfigError("--algorithms is empty; name at least one, such as local,fedavg,mira")
    from fedmira.comparison import compare_algorithms

    folder = output or fresh_folder("compare")
    say(f"comparing {', '.join(names)} with seeds {', '.join(map(str, numbers))}, into {folder}")
    comparison = compare_algorithms(chosen, names, numbers, folder, show_progress)
    if format is Format.json:
        print_json({"folder": str(folder), "report": str(comparison.page), "algorithms": comparison.rows})
        return
    columns = list(comparison.rows[-1])
    print_table(
        "test loss per response token; clients against local, beyond 2 %",
        columns,
        [[row.get(column, "") for column in columns] for row in comparison.rows],
    )
    print(f"report: {comparison.page}")


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"--seeds {text!r}: must be whole numbers separated by commas, such as 0,1,2") from error
    if not seeds or min(seeds) < 0:
        raise ConfigError(f"--seeds {text!r}: needs at least one number, all 0 or more")
    return seeds
