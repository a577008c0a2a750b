"""Options that several verbs share, and where their settings come from."""

from __future__ import annotations

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmira.config import Config, load_config, load_data_settings
from fedmira.errors import ConfigError

if TYPE_CHECKING:
    from fedmira.data import ReadRows
    from fedmira.observers import Observer

__all__ = [
    "ConfigFile",
    "Format",
    "FormatOption",
    "Observers",
    "OutputFolder",
    "Overrides",
    "PresetName",
    "ReferenceShare",
    "RunPath",
    "fresh_folder",
    "is_rows",
    "names_of",
    "numbers_of",
    "observers_of",
    "seeds_of",
    "settings",
    "settings_and_rows",
]


_OF_ROWS = (".jsonl", ".ndjson", ".csv", ".tsv", ".tab", ".parquet")
"""Endings of files that can only be rows; a .json may be settings for another tool."""


class Format(StrEnum):
    """How results are printed."""

    text = "text"
    json = "json"


ConfigFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="[CONFIG.toml | ROWS]",
        help="Settings in TOML, or a folder or file of rows for the default settings. With neither "
        "this nor --preset: the demo.",
        show_default=False,
    ),
]
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset", help="A named set of settings; see: fedmira presets", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one setting, e.g. --set rounds.count=5. May be repeated.",
        show_default=False,
    ),
]
OutputFolder = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="The run folder. Default: a new folder in runs/.", show_default=False
    ),
]
FormatOption = Annotated[
    Format, typer.Option("--format", help="text, or one JSON document on stdout.")
]
Observers = Annotated[
    list[str] | None,
    typer.Option(
        "--observer",
        metavar="TRACKER[=WHERE]",
        help="Follow the run with tensorboard, trackio, wandb or mlflow; WHERE is a folder, a "
        "project, or an address. May be repeated.",
        show_default=False,
    ),
]
ReferenceShare = Annotated[
    float | None,
    typer.Option(
        "--reference-share",
        help="Share of each token's probability that comes from the client's training rows, 0 or "
        "more and below 1. Default: the run's setting.",
        show_default=False,
    ),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]


def settings(config: Path | None, preset: str | None, overrides: list[str] | None) -> Config:
    """The checked config.

    Raises:
        ConfigError: with all problems together.
    """
    config, overrides = _of_rows(config, overrides or [])
    if config is not None and not config.exists():
        raise ConfigError(
            f"{config}: there is no such config file; write one, or use --preset (fedmira "
            "presets lists them)"
        )
    return load_config(config, preset, overrides)


def is_rows(path: Path | None) -> bool:
    """Whether what stands in the place of a config is a folder or a file of rows."""
    if path is None or not path.exists():
        return False
    return path.is_dir() or path.name.lower().removesuffix(".gz").endswith(_OF_ROWS)


def _of_rows(config: Path | None, overrides: list[str]) -> tuple[Path | None, list[str]]:
    """Rows in the place of a config are settings that name them, below those of --set."""
    if config is None or not is_rows(config):
        return config, overrides
    # In quotes, since the name of a folder may look like a number.
    path = json.dumps(str(config), ensure_ascii=False)
    return None, ["data.source=jsonl", f"data.path={path}", *overrides]


def settings_and_rows(
    config: Path | None,
    preset: str | None,
    overrides: list[str] | None,
    seed: int | None = None,
) -> tuple[Config, ReadRows]:
    """The checked config and the rows that it names.

    Rows come before what takes seconds to load, so that a wrong one is told within one.

    Args:
        config, preset, overrides: as for `settings`.
        seed: to draw and split the rows with; None for that of the config.

    Raises:
        ConfigError: with all problems of the settings together.
        DataError: with all problems of the rows together.
    """
    from fedmira.data import read_rows

    rows = None
    config, overrides = _of_rows(config, overrides or [])
    if found := load_data_settings(config, preset, overrides):
        data, own = found
        rows = read_rows(data, own if seed is None else seed)
    chosen = settings(config, preset, overrides)
    return chosen, rows or read_rows(chosen.data, chosen.seed if seed is None else seed)


def observers_of(texts: list[str] | None) -> list[Observer]:
    """The trackers that --observer names.

    Raises:
        ConfigError: one is not known, or its package is not installed.
    """
    from fedmira.observers import tracker

    return [tracker(*text.partition("=")[::2]) for text in texts or []]


def fresh_folder(name: str) -> Path:
    """A folder in runs/ that does not exist yet, named for what runs and when."""
    stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = [stem, *(stem.with_name(f"{stem.name}-{i}") for i in range(2, 100))]
    return next(path for path in candidates if not path.exists())


def names_of(text: str) -> list[str]:
    """Names that are separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers_of(option: str, text: str) -> list[int]:
    """Whole numbers that are separated by commas.

    Args:
        option: whose value it is, for the error.
        text: what was given.

    Raises:
        ConfigError: one is none.
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(
            f"{option} {text!r}: must be whole numbers separated by commas, such as 0,1,2"
        ) from error


def seeds_of(text: str) -> list[int]:
    """The seeds of --seeds.

    Raises:
        ConfigError: there are none, or one is no whole number, 0 or more.
    """
    seeds = numbers_of("--seeds", text)
    if not seeds or min(seeds) < 0:
        raise ConfigError(f"--seeds {text!r}: needs at least one number, all 0 or more")
    return seeds
