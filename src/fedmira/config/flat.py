"""A config as one flat mapping of dotted keys to single values.

For tools that know no lists and no tables.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping

import tomli_w

from fedmira.config.load import dump_config, load_config
from fedmira.config.schema import Config
from fedmira.errors import ConfigError

__all__ = ["FlatValue", "flattened", "unflattened"]

FlatValue = bool | int | float | str
_OPENERS = ("[", "{")


def flattened(config: Config) -> dict[str, FlatValue]:
    """Dotted key -> value, with every default; a list or a table is written as TOML text."""
    flat: dict[str, FlatValue] = {}
    for section, value in tomllib.loads(dump_config(config)).items():
        if isinstance(value, dict):
            flat |= {f"{section}.{key}": _single(inner) for key, inner in value.items()}
        else:
            flat[section] = value
    return flat


def unflattened(values: Mapping[str, object]) -> Config:
    """The config that `flattened` wrote, with whatever was changed since.

    Raises:
        ConfigError: with all problems together.
    """
    overrides, problems = [], []
    for key, value in values.items():
        if isinstance(value, bool):
            overrides.append(f"{key}={str(value).lower()}")
        elif isinstance(value, int | float):
            overrides.append(f"{key}={value!r}")
        elif isinstance(value, str):
            plain = value.startswith(_OPENERS)
            overrides.append(f"{key}={value if plain else json.dumps(value, ensure_ascii=False)}")
        else:
            problems.append(
                f"{key}: a value of type {type(value).__name__}; must be a text, a number, "
                "true or false"
            )
    if problems:
        raise ConfigError(problems)
    return load_config(None, None, overrides)


def _single(value: object) -> FlatValue:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        pairs = (
            f"{json.dumps(key, ensure_ascii=False)} = {_text(inner)}"
            for key, inner in value.items()
        )
        return "{" + ", ".join(pairs) + "}"
    return _text(value)


def _text(value: object) -> str:
    """A value as TOML on one line."""
    written = (
        tomli_w.dumps({"value": value}, multiline_strings=False).removeprefix("value = ").strip()
    )
    return " ".join(line.strip() for line in written.splitlines())
