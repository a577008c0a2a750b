"""The table of sources of rows: what `data.source` may name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from fedmira.config.offered import loaded, offered

__all__ = ["OBJECT", "SOURCES", "SourceName", "source_names", "source_reader"]

SOURCES: Mapping[str, str] = {
    "demo": "fedmira.data.sources.demo:read",
    "natural-instructions": "fedmira.data.sources.natural_instructions:read",
    "dolly": "fedmira.data.sources.dolly:read",
    "jsonl": "fedmira.data.sources.jsonl:read",
    "hub": "fedmira.data.sources.hub:read",
    "trajectories": "fedmira.data.sources.trajectories:read",
}
"""data.source -> where its reader is. A new source is a file and a line here."""

OBJECT = "object"
"""The source of rows that were given from Python; no reader has them."""

ENTRY_POINTS = "fedmira.sources"
"""The group of entry points by which other packages bring sources of their own."""


@cache
def _offered() -> dict[str, EntryPoint]:
    return offered(ENTRY_POINTS, "source", SOURCES)


def source_names() -> tuple[str, ...]:
    """All names that [data] knows: ours in the order of the table, then those of other packages."""
    return (*SOURCES, *_offered())


def source_reader(name: str) -> Any:
    """The reader of a source: a function of the [data] section and the seed.

    Args:
        name: one of `source_names`.
    """
    return loaded(name, SOURCES, {} if name in SOURCES else _offered())


def _known(value: Any) -> Any:
    """Refuses a name that no source has, in the way of pydantic's literals."""
    if value not in (names := (*source_names(), OBJECT)):
        raise PydanticCustomError(
            "literal_error",
            "unknown source",
            {"expected": ", ".join(map(repr, names))},
        )
    return value


SourceName = Annotated[
    str, BeforeValidator(_known), WithJsonSchema({"type": "string", "enum": [*SOURCES, OBJECT]})
]
"""The type of `data.source`."""
