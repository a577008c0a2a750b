"""The private memories of thousands of clients on disk, beside their adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fedmira.messages import ClientId, Payload, flattened, in_parts
from fedmira.storage.table import AdapterStore

__all__ = ["MemoryTable", "StoredMemory", "remembered"]


@dataclass(frozen=True, slots=True)
class StoredMemory:
    """Where a memory lies: its tensors' key in the store, its parts' names, and numbers.

    Attributes:
        key: of its tensors in the store.
        parts: names of the payload's parts.
        scalars: name -> number.
    """

    key: str
    parts: tuple[str, ...]
    scalars: Mapping[str, float]


class MemoryTable(Mapping[ClientId, Payload]):
    """Client -> its memory, read from a store when it is asked for; a value that never changes.

    The tensors of a memory are stored as one adapter whose names are "part|name".

    Args:
        store: where the tensors are.
        entries: client -> where its memory lies.
    """

    __slots__ = ("_entries", "store")

    def __init__(self, store: AdapterStore, entries: Mapping[ClientId, StoredMemory]) -> None:
        self.store = store
        self._entries = dict(entries)

    @classmethod
    def of(cls, store: AdapterStore, memories: Mapping[ClientId, Payload]) -> MemoryTable:
        """The same memories with their tensors in the store.

        Args:
            store: where the tensors are written.
            memories: client id -> memory.
        """
        if isinstance(memories, MemoryTable) and memories.store is store:
            return memories
        return cls(store, {}).replaced(memories)

    def replaced(self, changes: Mapping[ClientId, Payload]) -> MemoryTable:
        """A table with these memories changed or added; all others are shared with this one."""
        stored = {client: _put(self.store, memory) for client, memory in changes.items()}
        return MemoryTable(self.store, {**self._entries, **stored})

    @property
    def entries(self) -> Mapping[ClientId, StoredMemory]:
        """client -> where its memory lies; reads nothing."""
        return MappingProxyType(self._entries)

    def __getitem__(self, client: ClientId) -> Payload:
        entry = self._entries[client]
        return Payload(in_parts(self.store.get(entry.key), entry.parts), entry.scalars)

    def __contains__(self, client: object) -> bool:
        return client in self._entries

    def __iter__(self) -> Iterator[ClientId]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def remembered(
    memories: Mapping[ClientId, Payload], changes: Mapping[ClientId, Payload]
) -> Mapping[ClientId, Payload]:
    """`memories` with some changed or added, as a new mapping.

    A table on disk stays one, any other becomes a dict.

    Args:
        memories: client id -> memory; it stays as it is.
        changes: client id -> new memory.
    """
    return (
        memories.replaced(changes) if isinstance(memories, MemoryTable) else {**memories, **changes}
    )


def _put(store: AdapterStore, memory: Payload) -> StoredMemory:
    key = store.put(flattened(memory.tensors))
    return StoredMemory(key, tuple(memory.tensors), dict(memory.scalars))
