"""Mappings from names to adapters.

Read when they are asked for, and changed without being changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

from fedmira.adapters.arithmetic import Adapter

__all__ = ["LazyAdapters", "Replaceable", "replaced"]


class LazyAdapters(Mapping[str, Adapter]):
    """Adapters that a function reads when they are asked for; nothing is kept.

    Args:
        names: in their order.
        read: the adapter of a name.
    """

    __slots__ = ("_names", "_read")

    def __init__(self, names: Iterable[str], read: Callable[[str], Adapter]) -> None:
        self._names = dict.fromkeys(names)
        self._read = read

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
