"""One file per source; `fedmira.config.sources.SOURCES` is the table of their names."""

from __future__ import annotations

from collections.abc import Callable

from fedmira.config.schema import DataSettings
from fedmira.config.sources import source_reader
from fedmira.data.examples import Reading
from fedmira.errors import ConfigError

__all__ = ["Reader", "reader"]

Reader = Callable[[DataSettings, int], Reading]
"""From the [data] section and the seed of the run to the tasks of a source."""


def reader(name: str) -> Reader:
    """The reader of a source, ours or that of another package.

    Args:
        name: as `data.source` has it.

    Raises:
        ConfigError: what another package offers by that name is no function.
    """
    found = source_reader(name)
    if not callable(found):
        raise ConfigError(
            f"source {name!r}: {found!r} is no function; the entry point must name one "
            "that takes the "
            "[data] settings and the seed and returns a fedmira.data.Reading"
        )
    read: Reader = found
    return read
