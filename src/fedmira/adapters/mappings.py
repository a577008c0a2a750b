"""Mappings from names to adapters.

Read when they are asked for, and changed without being changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

from fedmira.adapters.arithmetic import Adapter

__all__ = ["Hashed", "LazyAdapters", "Replaceable", "known_hash", "replaced"]


class LazyAdapters(Mapping[str, Adapter]):
    """Adapters that a function reads when they are asked for; nothing is kept.

    Args:
        names: in their order.
        read: the adapter of a name.
        hash_of: the content hash of a name's adapter, where it is known without reading it.
    """

    __slots__ = ("_hash_of", "_names", "_read")

    def __init__(
        self,
        names: Iterable[str],
        read: Callable[[str], Adapter],
        hash_of: Callable[[str], str] | None = None,
    ) -> None:
        self._names = dict.fromkeys(names)
        self._read, self._hash_of = read, hash_of

    def hash_of(self, name: str) -> str | None:
        """The content hash of an adapter; None where it must be read to know it.

        Args:
            name: whose adapter.
        """
        return None if self._hash_of is None else self._hash_of(name)

    def only(self, names: Iterable[str]) -> LazyAdapters:
        """The same of these names.

        Args:
            names: some of those that are here.
        """
        return LazyAdapters(names, self._read, self._hash_of)

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@runtime_checkable
class Hashed(Protocol):
    """A mapping that knows content hashes of its adapters without reading them."""

    def hash_of(self, name: str) -> str | None:
        """The content hash of an adapter; None where it must be read to know it."""
        ...


def known_hash(adapters: Mapping[str, Adapter], name: str) -> Hashable:
    """Equal for two names whose adapters are known to be equal, without reading any.

    >>> from fedmira.adapters import known_hash
    >>> common = {"north": (start := {}), "south": start, "east": {}}
    >>> known_hash(common, "north") == known_hash(common, "south")
    True
    >>> known_hash(common, "north") == known_hash(common, "east")
    False

    Args:
        adapters: name -> adapter.
        name: one of them.

    Returns:
        The content hash where the mapping knows it, the object's identity in a dict, and the name
        itself elsewhere.
    """
    if isinstance(adapters, Hashed) and (known := adapters.hash_of(name)) is not None:
        return known
    return id(adapters[name]) if isinstance(adapters, dict) else name


@runtime_checkable
class Replaceable(Protocol):
    """A mapping that makes a changed one of itself, such as a table on disk."""

    def replaced(self, changes: Mapping[str, Adapter]) -> Mapping[str, Adapter]:
        """A mapping with these entries changed or added; all others are shared with this one."""
        ...


def replaced(
    adapters: Mapping[str, Adapter], changes: Mapping[str, Adapter]
) -> Mapping[str, Adapter]:
    """`adapters` with some entries changed or added, as a new mapping.

    A table on disk stays one, any other becomes a dict.

    >>> from fedmira.adapters import replaced
    >>> sorted(replaced({"north": {}, "south": {}}, {"east": {}}))
    ['east', 'north', 'south']

    Args:
        adapters: name -> adapter; it stays as it is.
        changes: name -> new adapter.
    """
    return (
        adapters.replaced(changes) if isinstance(adapters, Replaceable) else {**adapters, **changes}
    )
