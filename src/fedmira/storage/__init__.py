"""What lies on the disk: adapters named by their content, private memories, large numbers."""

from fedmira.storage.memories import MemoryTable, StoredMemory, remembered
from fedmira.storage.numbers import NumberStore
from fedmira.storage.table import AdapterStore, AdapterTable

__all__ = [
    "AdapterStore",
    "AdapterTable",
    "MemoryTable",
    "NumberStore",
    "StoredMemory",
    "remembered",
]
