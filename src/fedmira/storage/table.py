"""Adapters of thousands of clients on disk.

A store of files named by their content, and mappings that read it lazily.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedmira.adapters import Adapter, HashedAdapter, LazyAdapters, content_hash
from fedmira.adapters.arithmetic import DIGEST_DIGITS
from fedmira.atomic import PARTIAL, replace_file, sync
from fedmira.errors import MachineError, RunFolderError
from fedmira.records import told

__all__ = ["CACHE_BYTES", "AdapterStore", "AdapterTable"]

CACHE_BYTES = 16 * 2**20
"""Most bytes of adapters that a store keeps in memory, however many lie on disk."""

_SUFFIX = ".safetensors"


class AdapterStore:
    """A folder of adapters in which equal adapters are stored once.

    Each file is named by the SHA-256 of its content.

    Nothing is ever changed in place. What was written is sure to survive a power cut only after
    `flush`.

    Args:
        folder: made by the first `put`.
        cache_bytes: most bytes of adapters that stay in memory, those used last; the newest stays
            whatever its size.
    """

    def __init__(self, folder: Path, cache_bytes: int = CACHE_BYTES) -> None:
        self.folder = folder
        self._cache_bytes = cache_bytes
        self._cached: OrderedDict[str, HashedAdapter] = OrderedDict()
        self._cached_bytes = 0
        self._stored = {path.name.removesuffix(_SUFFIX) for path in folder.glob(f"*{_SUFFIX}")}
        self._unflushed: set[str] = set()

    def __contains__(self, key: object) -> bool:
        """Whether an adapter with this key is stored."""
        return key in self._stored

    def __len__(self) -> int:
        """How many different adapters are stored."""
        return len(self._stored)

    def put(self, adapter: Adapter) -> str:
        """Store an adapter, unless it is there.

        Returns:
            Its key: the 64 hex digits of its content hash.
        """
        key = content_hash(adapter)
        if key not in self._stored:
            # Copies: a view would keep the whole stack of its cohort in memory, and safetensors
            # refuses tensors that overlap.
            own = HashedAdapter(
                {name: adapter[name].detach().contiguous().clone() for name in sorted(adapter)}, key
            )
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._path(key), save(dict(own)), lasting=False)
            self._stored.add(key)
            self._unflushed.add(key)
            self._remember(own)
        return key

    def get(self, key: str) -> HashedAdapter:
        """The adapter with this key, bit for bit as it was stored.

        Its names are in alphabetical order.

        Raises:
            RunFolderError: its file is missing or damaged.
            MachineError: the system does not let it be read.
        """
        known = self._cached.get(key)
        if known is not None:
            self._cached.move_to_end(key)
            return known
        path = self._path(key)
        try:
            # From bytes and not from a mapped file: nothing stays open, and the file may be removed
            # meanwhile.
            tensors = load(path.read_bytes())
        except (FileNotFoundError, SafetensorError, KeyError, ValueError) as error:
            raise RunFolderError(
                f"{path}: the adapter cannot be read ({error}); restore the file or start a new run"
            ) from error
        except OSError as error:
            raise MachineError(told(error, path)) from error
        if content_hash(tensors) != key:
            raise RunFolderError(
                f"{path}: the file is damaged: its content has another SHA-256 than the one it is "
                "named by; restore the file, or resume from the checkpoint before"
            )
        adapter = HashedAdapter({name: tensors[name] for name in sorted(tensors)}, key)
        self._remember(adapter)
        return adapter

    def problem(self, key: str) -> str:
        """Why the file of a key cannot be read back as it was stored; "" where it can.

        Args:
            key: what `put` gave.
        """
        if key not in self._stored:
            return f"{self.folder.name}/{key}{_SUFFIX} is missing"
        self._forget(key)  # the file is what counts
        try:
            self.get(key)
        except RunFolderError as error:
            return str(error)
        return ""

    def flush(self, keys: Iterable[str]) -> None:
        """Have the disk hold the adapters with these keys.

        Only those that were written since the last time are synchronised.
        """
        pending = self._unflushed.intersection(keys)
        for key in pending:
            sync(self._path(key))
        if pending:
            sync(self.folder)
        self._unflushed -= pending

    def sweep(self, live: Collection[str]) -> int:
        """Remove every adapter whose key is not in `live`.

        Returns:
            How many adapters were removed.
        """
        dead = self._stored.difference(live)
        for key in dead:
            self._path(key).unlink(missing_ok=True)
            self._forget(key)
        self._stored -= dead
        self._unflushed -= dead
        return len(dead)

    def remove_halves(self) -> None:
        """Remove what a crash left half written."""
        for path in self.folder.glob(f"*{PARTIAL}"):
            path.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / (key + _SUFFIX)

    def _remember(self, adapter: HashedAdapter) -> None:
        self._forget(adapter.sha256)
        self._cached[adapter.sha256] = adapter
        self._cached_bytes += adapter.num_bytes
        while self._cached_bytes > self._cache_bytes and len(self._cached) > 1:
            self._forget(next(iter(self._cached)))

    def _forget(self, key: str) -> None:
        dropped = self._cached.pop(key, None)
        if dropped is not None:
            self._cached_bytes -= dropped.num_bytes


class _UnreadAdapter(HashedAdapter):
    """An adapter in a store of which only the hash is known until a tensor is asked for.

    Args:
        store: where it is.
        key: its content hash, by which it is stored.
    """

    __slots__ = ("_store",)

    def __init__(self, store: AdapterStore, key: str) -> None:
        super().__init__({}, key)
        self._store = store

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return self._store.get(self.sha256).num_bytes

    def __getitem__(self, name: str) -> Tensor:
        return self._store.get(self.sha256)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.get(self.sha256))

    def __len__(self) -> int:
        return len(self._store.get(self.sha256))


class AdapterTable(Mapping[str, Adapter]):
    """Name -> adapter in a store, read when it is asked for; a value that never changes.

    Args:
        store: where the adapters are.
        keys: name -> key in the store.
    """

    __slots__ = ("_keys", "store")

    def __init__(self, store: AdapterStore, keys: Mapping[str, str]) -> None:
        self.store = store
        self._keys = dict(keys)

    @classmethod
    def of(cls, store: AdapterStore, adapters: Mapping[str, Adapter]) -> AdapterTable:
        """The same mapping with its adapters in the store.

        An adapter that several names share is hashed once.

        Args:
            store: where the adapters are written.
            adapters: name -> adapter.
        """
        if isinstance(adapters, AdapterTable) and adapters.store is store:
            return adapters
        return cls(store, {}).replaced(adapters)

    def replaced(self, changes: Mapping[str, Adapter]) -> AdapterTable:
        """A table with these entries changed or added; all others are shared with this one."""
        table = AdapterTable(self.store, self._keys)
        table._keys.update(_put_all(self.store, changes))
        return table

    @property
    def hashes(self) -> Mapping[str, str]:
        """name -> content hash of its adapter, which is its key in the store; reads nothing."""
        return MappingProxyType(self._keys)

    def hash_of(self, name: str) -> str:
        """The content hash of an adapter, without reading it.

        Args:
            name: whose adapter.
        """
        return self._keys[name]

    def unread(self) -> LazyAdapters:
        """The same adapters, each read when one of its tensors is asked for."""
        return LazyAdapters(
            self._keys, lambda name: _UnreadAdapter(self.store, self._keys[name]), self.hash_of
        )

    def digest_of(self, name: str) -> str:
        """The digest of an adapter, without reading it."""
        return self._keys[name][:DIGEST_DIGITS]

    def __getitem__(self, name: str) -> Adapter:
        return self.store.get(self._keys[name])

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _put_all(store: AdapterStore, adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """name -> key, after storing each adapter."""
    keys: dict[str, str] = {}
    last: Adapter | None = None
    key = ""
    for name, adapter in adapters.items():
        if adapter is not last:  # before round 1 all clients share one object: hash it once
            last, key = adapter, store.put(adapter)
        keys[name] = key
    return keys
