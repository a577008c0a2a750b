"""The one call from Python: settings in, a finished run out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from fedmira.config import Config, load_config
from fedmira.errors import ConfigError
from fedmira.experiment import build_experiment, start_experiment
from fedmira.observers import Observer
from fedmira.runs import Result

__all__ = ["run"]


def run(
    config: Config | str | Path | Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    output: str | Path,
    resume: bool = False,
    observers: Sequence[Observer] = (),
) -> Result:
    """Run a federation and return its adapters, metrics and graph.

    Args:
        config: a Config, a TOML file, a mapping of dotted keys to values such as {"algorithm.name":
            "local"}, or None for the demo.
        preset: a preset that lies under it.
        output: the run folder, which must be new; with `resume` the folder of the run to continue.
        observers: are told what happens, and may stop the run.

    Raises:
        InputError: something is wrong with the settings or the data; nothing was trained.
        RunError: the run failed; what was computed is in the folder.
    """
    if resume and config is None and preset is None:
        config = Path(output) / "config.toml"
    if isinstance(config, Config) and preset is not None:
        raise ConfigError(
            f"preset {preset!r} cannot lie under a Config, which is complete; give the "
            "settings that differ as a mapping instead"
        )
    if isinstance(config, Mapping):
        overrides = [f"{key}={_toml_value(value)}" for key, value in config.items()]
        config = load_config(None, preset, overrides)
    elif not isinstance(config, Config):
        config = load_config(Path(config) if config is not None else None, preset, ())
    experiment = build_experiment(config, resumed=Path(output) if resume else None)

    return start_experiment(experiment, Path(output), observers, resume=resume)


def _toml_value(value: Any) -> str:
    """A Python value as TOML that can stand behind an equals sign."""
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{json.dumps(key)} = {_toml_value(part)}" for key, part in value.items())
            + "}"
        )
    return tomli_w.dumps({"value": value}, multiline_strings=False).removeprefix("value = ").strip()
