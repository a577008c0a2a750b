"""Presets: complete config files that travel with the package.

Each opens with what it is and the command that runs it.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from fedmira.errors import ConfigError

__all__ = ["preset_description", "preset_names", "preset_path"]

_FOLDER = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def preset_path(name: str) -> Path:
    """The file of a preset.

    Raises:
        ConfigError: there is no preset of that name.
    """
    names = preset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"preset {name!r} does not exist; {hint}there are: {', '.join(names)}")
    return _FOLDER / f"{name}.toml"


def preset_description(name: str) -> str:
    """What a preset is, in one line: the first comment of its file.

    Raises:
        ConfigError: there is no preset of that name.
    """
    first_line, _, _ = preset_path(name).read_text(encoding="utf-8").partition("\n")
    return first_line.removeprefix("#").strip()
