"""fedmira presets: the settings that come with the package."""

from __future__ import annotations

from fedmira.cli.options import Format, FormatOption
from fedmira.cli.screen import print_json, print_table
from fedmira.config import preset_description, preset_names

__all__ = ["presets"]


def presets(format: FormatOption = Format.text) -> None:
    """List the presets.

    Example: fedmira presets
    """
    found = {name: preset_description(name) for name in preset_names()}
    if format is Format.json:
        print_json(found)
        return
    print_table("presets", ["preset", "what it is"], list(found.items()))
