"""Config layers: nested settings, and how an upper layer covers a lower one.

Layers come from a preset, a file and overrides.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmira.config.choices import drop_unread, written_out
from fedmira.config.methods import method_class, method_names
from fedmira.errors import ConfigError

__all__ = [
    "OVERRIDES",
    "Layer",
    "Settings",
    "cover",
    "read_overrides",
    "read_settings",
    "read_toml",
]

Settings = dict[str, Any]
"""Section -> key -> value, as in the TOML file.

Top-level keys such as `seed` sit beside the sections.
"""

SETTINGS = "settings"
"""The source of the layer that is given from Python."""

OVERRIDES = "--set"
"""The source of the layer of overrides, whose values a command line hands over as text."""

_OTHER_FORMATS = (".yaml", ".yml", ".json", ".ini", ".cfg")

_RIVALS = {
    "adapter": (("rank", "rank_distribution"),),
    "algorithm": (("coupling", "server_step"),),
    "local": (("steps", "epochs"),),
}
"""Pairs of keys that say one thing in two ways: setting one above removes the other below."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Settings and where they were written, for error messages.

    "" for those of a config that was checked before.

    Attributes:
        source: the file or the option, such as "--set".
        settings: nested by section.
    """

    source: str
    settings: Settings

    @property
    def written(self) -> Settings:
        """What somebody chose to write here.

        Nothing of a config that was checked before, and no section that is there in full.
        """
        if not self.source:
            return {}
        return {
            name: value for name, value in self.settings.items() if not written_out(name, value)
        }


def read_toml(path: Path, source: str) -> Layer:
    """Read one config file.

    Args:
        path: of the file.
        source: what errors call it.

    Raises:
        ConfigError: the file is missing, unreadable, or not TOML; the message gives file, line and
            column.
    """
    if path.suffix.lower() in _OTHER_FORMATS and path.is_file():
        raise ConfigError(
            f"config file {source} ends in {path.suffix}, and a config is TOML: sections "
            "such as [rounds] with lines such as count = 5; "
            "docs/configuration.md lists every key, and fedmira presets lists files to begin with"
        )
    try:
        # utf-8-sig: some editors put a byte order mark in front, which is not TOML.
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"config file {source} does not exist; give the path of a TOML file, or use --preset"
        ) from None
    except OSError as error:
        raise ConfigError(f"config file {source} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"config file {source} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    try:
        return Layer(source, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_locate(str(error), source, text)) from None


def read_overrides(overrides: Sequence[str]) -> tuple[Layer, list[str]]:
    """Read `key=value` overrides; a later one wins over an earlier one of the same key.

    Returns:
        The layer of all readable overrides, and one problem for each that is not.
    """
    settings: Settings = {}
    problems = []
    for override in overrides:
        key, equals, value = override.partition("=")
        path = _split_key(key)
        if not equals or not path:
            problems.append(
                f"--set {override!r}: must be key=value with a dotted key, such as rounds.count=5"
            )
            continue
        section = settings
        for name in path[:-1]:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[path[-1]] = _read_value(value.strip())
    return Layer(OVERRIDES, settings), problems


def read_settings(given: Mapping[str, Any]) -> tuple[Layer, list[str]]:
    """Reads dotted keys with values of Python; Path, tuples and numpy's numbers are fine.

    Args:
        given: dotted key -> value; a None is left out, and a mapping holds the keys of a section.

    Returns:
        The layer of all readable keys, and one problem for each that is not.
    """
    settings: Settings = {}
    problems = []
    for key, value in given.items():
        path = _split_key(key) if isinstance(key, str) else []
        if not path:
            problems.append(f"settings[{key!r}]: must be a dotted key, such as 'rounds.count'")
            continue
        plain = _plain(value)
        if plain is None:
            continue
        section = settings
        for name in path[:-1]:
            inner = section.setdefault(name, {})
            if not isinstance(inner, dict):
                inner = section[name] = {}
            section = inner
        below = section.get(path[-1])
        both = isinstance(below, dict) and isinstance(plain, dict)
        section[path[-1]] = _join(below, plain) if both else plain  # type: ignore[arg-type]
    return Layer(SETTINGS, settings), problems


def _plain(value: Any) -> Any:
    """A value as TOML would have it; None where there is none."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist") and not isinstance(value, str):  # numpy
        value = value.tolist()
    if isinstance(value, Mapping):
        found = {str(key): _plain(inner) for key, inner in value.items()}
        return {key: inner for key, inner in found.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def cover(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> Settings:
    """Put `upper` on `lower`: sections are joined, all other values of `upper` win.

    What `upper` makes meaningless in `lower` goes with it, so that a change of one key is enough:
    the settings that a newly named algorithm does not have, the rival of a key (`coupling` and
    `server_step`, `steps` and `epochs`, `rank` and `rank_distribution`), the file of another kind
    of graph, what another kind of graph or adapter or another optimizer does not read, and the
    limit of gradients under slopes along random directions and the other way round. What `upper`
    itself sets is never dropped.

    Args:
        lower: nested settings; they stay as they are.
        upper: nested settings that win.
    """
    kept = {
        name: dict(value) if isinstance(value, dict) else value for name, value in lower.items()
    }
    for name, keys in upper.items():
        if isinstance(keys, dict) and isinstance(kept.get(name), dict):
            _drop_outdated(name, kept[name], keys)
    return _join(kept, upper)


def _drop_outdated(section: str, below: Settings, above: Mapping[str, Any]) -> None:
    if section == "algorithm" and above.get("name") in method_names():
        fields = method_class(above["name"]).model_fields
        for key in [key for key in below if key not in fields]:
            del below[key]
    if section == "graph" and above.get("kind", "file") != "file":
        below.pop("path", None)
    drop_unread(section, below, above)
    if (
        section == "local"
        and "optimizer" in above
        and _random_directions(above) != _random_directions(below)
    ):
        below.pop("max_grad_norm", None)  # the norm of one is not that of the other
    for first, second in _RIVALS.get(section, ()):
        if first in above:
            below.pop(second, None)
        if second in above:
            below.pop(first, None)


def _random_directions(local: Mapping[str, Any]) -> bool:
    return local.get("optimizer") == "zeroth-order"


def _join(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> Settings:
    joined = dict(lower)
    for name, value in upper.items():
        below = joined.get(name)
        joined[name] = (
            _join(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
        )
    return joined


def _split_key(key: str) -> list[str]:
    """The names of a dotted TOML key, quoted names included; empty where it is none."""
    if "\n" in key or "=" in key:
        return []
    try:
        nested: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return []
    path = []
    while isinstance(nested, dict) and nested:
        [(name, nested)] = nested.items()
        path.append(name)
    return path


def _read_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _locate(message: str, source: str, text: str) -> str:
    found = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    if not found:
        return f"{source}: not valid TOML: {message}"
    lines = text.split("\n")
    line, column = (int(found[1]), int(found[2])) if found[1] else (len(lines), len(lines[-1]) + 1)
    hint = _missing_quotes(lines[line - 1], column) if message.startswith("Invalid value") else ""
    return f"{source}:{line}:{column}: not valid TOML: {message[: found.start()]}{hint}"


def _missing_quotes(line: str, column: int) -> str:
    """What to write in place of a bare word as a value; "" where none stands there."""
    word = re.match(r"[A-Za-z_.~/\\][^#,\]}]*", line[column - 1 :])
    if not word:
        return ""
    if word[0].strip() in ("True", "False"):
        return f"; write {word[0].strip().lower()}"
    return f"; text needs quotes: '{word[0].strip()}'"
