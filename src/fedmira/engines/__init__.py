"""Who carries requests to clients and replies back.

The names below are imported when they are first used: a Flower node imports this package for every message, which must not take long.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmira.engines.base import Engine
    from fedmira.engines.in_process import InProcessEngine
    from fedmira.engines.memories import MemoryTable, StoredMemory, remembered

__all__ = ["Engine", "InProcessEngine", "MemoryTable", "StoredMemory", "remembered"]

_HOMES = {
    "Engine": "base",
    "InProcessEngine": "in_process",
    "MemoryTable": "memories",
    "NodeMemory": "node_memory",
    "StoredMemory": "memories",
    "remembered": "memories",
}


def __getattr__(name: str) -> Any:
    """Import a name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
