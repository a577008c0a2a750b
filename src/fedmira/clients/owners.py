"""Which rows are measured with which adapter: clients whose adapters are equal are one owner.

Their rows then share passes and beginnings of prompts, as those of a single client do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedmira.adapters import Adapter, known_hash
from fedmira.data import EncodedExample
from fedmira.messages import ClientId
from fedmira.model import Row

__all__ = ["Owner", "dealt", "drawn_rows", "owners_of"]

Place = tuple[ClientId, int]
"""A client, and the position of one of its rows."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Rows of one or more clients with equal adapters.

    Attributes:
        client: whose adapter is read for all of them.
        places: the rows.
        tokens: of these rows.
    """

    client: ClientId
    places: tuple[Place, ...]
    tokens: int


def owners_of(
    adapters: Mapping[ClientId, Adapter],
    clients: Sequence[ClientId],
    rows_of: Callable[[ClientId], Sequence[Row]],
    scales: Mapping[ClientId, float],
    most: int,
) -> list[Owner]:
    """The owners of some clients' rows.

    A client whose adapter nobody else has keeps its rows in their order. Rows of several clients
    are put in the order of their prompts, so that those that begin alike lie beside each other.

    Args:
        adapters: by client id; none is read.
        clients: those whose rows are measured, in their order.
        rows_of: a client's rows.
        scales: client id -> s of its adapter.
        most: tokens of an owner; where clients with one adapter have more, they become several.
    """
    groups: dict[tuple[Hashable, float], list[ClientId]] = {}
    for client in clients:
        groups.setdefault((known_hash(adapters, client), scales[client]), []).append(client)
    found: list[Owner] = []
    for group in groups.values():
        places = [(client, i) for client in group for i in range(len(rows_of(client)))]
        if len(group) == 1:
            found.append(Owner(group[0], tuple(places), sum(map(_length, rows_of(group[0])))))
            continue
        places.sort(key=lambda place: tuple(rows_of(place[0])[place[1]].prompt))
        lengths = [_length(rows_of(client)[i]) for client, i in places]
        found += [
            Owner(group[0], tuple(places[part]), sum(lengths[part]))
            for part in _parts(lengths, most)
        ]
    return found


def dealt(owners: Sequence[Owner], at_once: int, most: int) -> list[list[Owner]]:
    """Owners in shares, which depend on them alone.

    Args:
        owners: in their order.
        at_once: most owners of a share.
        most: tokens with which a share is complete.
    """
    shares: list[list[Owner]] = []
    tokens = most
    for owner in owners:
        if tokens >= most or len(shares[-1]) == at_once:
            shares.append([])
            tokens = 0
        shares[-1].append(owner)
        tokens += owner.tokens
    return shares


def drawn_rows(
    rows: tuple[EncodedExample, ...], most: int, seed: int
) -> tuple[EncodedExample, ...]:
    """At most so many of these rows, in their order.

    Args:
        rows: of one client.
        most: how many stay.
        seed: of the draw.
    """
    if len(rows) <= most:
        return rows
    return tuple(rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), most)))


def _parts(lengths: Sequence[int], most: int) -> Iterator[slice]:
    """Slices of neighbours that together have at least so many tokens, but for the last."""
    start = total = 0
    for place, length in enumerate(lengths, 1):
        total += length
        if total >= most or place == len(lengths):
            yield slice(start, place)
            start, total = place, 0


def _length(row: Row) -> int:
    return len(row.prompt) + len(row.response)
