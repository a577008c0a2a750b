"""One file per source, and the table that a source's name is looked up in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from fedmira.config.schema import DataSettings
from fedmira.data.examples import Reading
from fedmira.data.sources import demo, dolly, hub, jsonl, natural_instructions

__all__ = ["SOURCES", "Reader"]

Reader = Callable[[DataSettings, int], Reading]

SOURCES: Mapping[str, Reader] = MappingProxyType(
    {
        "demo": demo.read,
        "natural-instructions": natural_instructions.read,
        "dolly": dolly.read,
        "jsonl": jsonl.read,
        "hub": hub.read,
    }
)
