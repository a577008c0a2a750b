"""What other packages offer by entry points, beside a table of our own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fedmira.errors import ConfigError

__all__ = ["loaded", "offered"]


def offered(group: str, what: str, table: Mapping[str, str]) -> dict[str, EntryPoint]:
    """Name -> what another package offers by that name.

    Args:
        group: of entry points, such as "fedmira.methods".
        what: one of them, in a word, for the message.
        table: our own names -> where they are, "module:name".

    Raises:
        ConfigError: a name is taken.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        if entry.name in table or entry.name in found:
            by = f"of {entry.dist.name}" if entry.dist else ""
            taken = table.get(entry.name) or found[entry.name].value
            raise ConfigError(
                f"{what} {entry.name!r} {by} ({entry.value}): the name is taken by {taken}; the "
                "package must choose another one"
            )
        found[entry.name] = entry
    return found


def loaded(name: str, table: Mapping[str, str], entries: Mapping[str, EntryPoint]) -> Any:
    """What a name stands for, imported now.

    Args:
        name: of the table or of the entries.
        table: our own names -> "module:name".
        entries: what `offered` found.
    """
    if name not in table:
        return entries[name].load()
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
