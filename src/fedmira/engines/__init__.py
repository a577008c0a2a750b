"""Who carries requests to clients and replies back."""

from fedmira.engines.base import Engine
from fedmira.engines.in_process import InProcessEngine
from fedmira.engines.memories import MemoryTable, StoredMemory, remembered

__all__ = ["Engine", "InProcessEngine", "MemoryTable", "StoredMemory", "remembered"]
