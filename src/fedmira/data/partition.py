"""Gives the rows of tasks to clients.

A client per task, several per category, or a Dirichlet mix of categories each.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedmira.config import DataSettings
from fedmira.data.examples import Example, RawTask, by_prompt
from fedmira.data.problems import Problems
from fedmira.data.randomness import generator, shuffled

__all__ = ["MOST_DRAWS", "ClientRows", "Partition", "partition_tasks", "safe_id"]

MOST_DRAWS = 1000
_LONGEST_ID = 200
_RESERVED = {"con", "prn", "aux", "nul"} | {
    f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10)
}
"""Names that Windows keeps for devices."""


@dataclass(frozen=True, slots=True)
class ClientRows:
    """The rows of one client before they are split.

    Attributes:
        client_id: unique.
        task: the task it works on; the category where clients are made from categories; "mixture"
            under "dirichlet".
        category: the family of its rows; "" under "dirichlet", where a client mixes several.
        examples, test, validation: as in `RawTask`.
    """

    client_id: str
    task: str
    category: str
    examples: Sequence[Example]
    test: Sequence[Example] | None = None
    validation: Sequence[Example] | None = None


@dataclass(frozen=True, slots=True)
class Partition:
    """All clients, what was left out with its reason, and whose name was changed.

    Attributes:
        clients: the clients, sorted by id.
        skipped: what was seen and not used, one line each.
        notes: what is to be said before training, one line each.
    """

    clients: tuple[ClientRows, ...]
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Pool:
    """All rows of one category."""

    category: str
    examples: list[Example]
    test: list[Example] | None
    validation: list[Example] | None


def partition_tasks(tasks: Sequence[RawTask], settings: DataSettings, seed: int) -> Partition:
    """Makes clients as `settings.partition` says and keeps the first `settings.clients` of them.

    Clients come in the order of the tasks, or of their sorted categories. Rows that a source sets
    aside for testing or validation are dealt to clients in the same way, and stay test or
    validation rows. Among the clients of one category, all rows with the same prompt go to one.

    Args:
        tasks: the rows of each task.
        settings: the [data] section.
        seed: the seed of the run.

    Raises:
        DataError: a task without a category where the partition needs one; too few rows; fewer
            clients than asked for; a name twice.
    """
    problems = Problems()
    if settings.partition == "column" and settings.source not in ("jsonl", "hub"):
        problems.add(
            f"data.partition = 'column' needs source jsonl or hub; {settings.source} has "
            "no client column, use 'task'"
        )
    names = [task.name for task in tasks]
    for name in sorted(
        {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()
    ):
        problems.add(
            f"task {name!r} stands {names.count(name)} times in the source; names must be unique"
        )
    problems.raise_if_any()
    if settings.partition == "category":
        clients = _by_category(_pools(tasks, problems), settings, seed)
    elif settings.partition == "dirichlet":
        clients = _by_dirichlet(_pools(tasks, problems), settings, seed, problems)
    else:
        clients = [
            ClientRows(
                safe_id(task.name) or task.name,
                task.name,
                task.category,
                task.examples,
                task.test,
                task.validation,
            )
            for task in tasks
        ]
    problems.raise_if_any()
    return _kept(clients, settings, problems)


def _kept(clients: list[ClientRows], settings: DataSettings, problems: Problems) -> Partition:
    small = [
        f"{client.client_id}: {len(client.examples)} rows; data.min_rows is {settings.min_rows}"
        for client in clients
        if len(client.examples) < settings.min_rows
    ]
    kept = [client for client in clients if len(client.examples) >= settings.min_rows]
    if settings.clients > len(kept):
        problems.add(
            f"data.clients is {settings.clients}; the source gives {len(kept)} clients "
            f"with at least {settings.min_rows} rows; "
            "set it to 0 to take them all"
        )
    if not kept:
        problems.add(f"no client has at least {settings.min_rows} rows (data.min_rows)")
    if len(problems):
        for line in small:
            problems.add(line)
    problems.raise_if_any()
    taken = tuple(kept[: settings.clients or len(kept)])
    notes = tuple(
        f"client {client.task!r} is called {client.client_id!r}, which can name a folder everywhere"
        for client in taken
        if settings.partition in ("task", "column") and client.client_id != client.task
    )
    return Partition(taken, tuple(small), notes)


def _pools(tasks: Sequence[RawTask], problems: Problems) -> list[_Pool]:
    """The rows of each category together, sorted by category."""
    for task in tasks:
        if not task.category:
            problems.add(
                f"task {task.name!r} has no category, which the partition needs; use "
                "data.partition = 'task'"
            )
    problems.raise_if_any()
    pools = []
    for category in sorted({task.category for task in tasks}):
        members = [task for task in tasks if task.category == category]
        examples = [example for task in members for example in task.examples]
        test = _together(
            [task.test for task in members], f"category {category!r}", "test", problems
        )
        validation = _together(
            [task.validation for task in members], f"category {category!r}", "validation", problems
        )
        pools.append(_Pool(category, examples, test, validation))
    problems.raise_if_any()
    return pools


def _together(
    parts: Sequence[Sequence[Example] | None], whose: str, kind: str, problems: Problems
) -> list[Example] | None:
    """All rows that sources set aside, or None when none does; either all tasks do or none."""
    given = [part for part in parts if part is not None]
    if given and len(given) < len(parts):
        problems.add(
            f"{whose}: {len(given)} of its {len(parts)} tasks set {kind} rows aside; "
            "either all do or none"
        )
    return [example for part in given for example in part] if given else None


def _by_category(pools: Sequence[_Pool], settings: DataSettings, seed: int) -> list[ClientRows]:
    count = settings.clients_per_category
    clients = []
    for pool in pools:
        owners: dict[Hashable, int] = {}
        shares = {
            kind: _deal(rows, count, generator(seed, "category", pool.category, kind), owners)
            for kind, rows in (
                ("examples", pool.examples),
                ("test", pool.test),
                ("validation", pool.validation),
            )
            if rows is not None
        }
        for k in range(count):
            client_id = (
                _slug(pool.category)
                if count == 1
                else f"{_slug(pool.category)}-{k:0{len(str(count - 1))}d}"
            )
            mine = {kind: share[k] for kind, share in shares.items()}
            clients.append(
                ClientRows(
                    client_id,
                    pool.category,
                    pool.category,
                    mine["examples"],
                    mine.get("test"),
                    mine.get("validation"),
                )
            )
    return clients


def _deal(
    rows: Sequence[Example], count: int, rng: np.random.Generator, owners: dict[Hashable, int]
) -> list[list[Example]]:
    """Shuffled rows dealt like cards.

    Rows with the same prompt together, the next of them to the first client that has fewest.

    Where no prompt comes twice, shares differ by at most one row.

    Args:
        owners: prompt -> who has it, of kinds of rows that were dealt before; what is dealt here is
            added.
    """
    shares: list[list[Example]] = [[] for _ in range(count)]
    sizes = np.zeros(count, dtype=np.int64)
    for group in by_prompt(shuffled(rows, rng)):
        owner = owners.setdefault(group[0].prompt, int(sizes.argmin()))
        shares[owner].extend(group)
        sizes[owner] += len(group)
    return shares


def _by_dirichlet(
    pools: Sequence[_Pool], settings: DataSettings, seed: int, problems: Problems
) -> list[ClientRows]:
    count, fewest = settings.dirichlet_clients, settings.min_rows
    total = sum(len(pool.examples) for pool in pools)
    if total < count * fewest:
        problems.add(
            f"{total} rows are too few for {count} clients (data.dirichlet_clients) with "
            f"at least {fewest} rows (data.min_rows); lower one"
        )
        return []
    _together([pool.test for pool in pools], "partition 'dirichlet'", "test", problems)
    _together([pool.validation for pool in pools], "partition 'dirichlet'", "validation", problems)
    problems.raise_if_any()
    rng = generator(seed, "dirichlet")
    orders = [replace(pool, examples=shuffled(pool.examples, rng)) for pool in pools]
    smallest = 0
    for _ in range(MOST_DRAWS):
        shares = _mixtures(orders, settings, rng)
        fewest_rows = min(len(share.examples) for share in shares)
        if fewest_rows >= fewest and all(share.test is None or share.test for share in shares):
            return shares
        smallest = max(smallest, fewest_rows)
    problems.add(
        f"partition 'dirichlet': in {MOST_DRAWS} draws the smallest of {count} clients had "
        f"at most {smallest} rows; must have {fewest} "
        "and, where the source sets test rows aside, one of them; raise "
        f"data.dirichlet_alpha ({settings.dirichlet_alpha:g}), "
        "or lower data.min_rows or data.dirichlet_clients"
    )
    return []


def _mixtures(
    pools: Sequence[_Pool], settings: DataSettings, rng: np.random.Generator
) -> list[ClientRows]:
    """One draw: each category is cut by Dirichlet proportions.

    A client that already has total / count rows gets no more of it.
    """
    count = settings.dirichlet_clients
    full = sum(len(pool.examples) for pool in pools) / count
    examples: list[list[Example]] = [[] for _ in range(count)]
    test: list[list[Example]] = [[] for _ in range(count)]
    validation: list[list[Example]] = [[] for _ in range(count)]
    for pool in pools:
        proportions = rng.dirichlet(np.full(count, settings.dirichlet_alpha))
        proportions = proportions * [len(rows) < full for rows in examples]
        if not proportions.sum() > 0:  # a tiny alpha may put everything on a client that is full
            proportions = np.array([float(len(rows) < full) for rows in examples])
        bounds = np.cumsum(proportions / proportions.sum())
        _cut(pool.examples, bounds, examples)
        _cut(pool.test or [], bounds, test)
        _cut(pool.validation or [], bounds, validation)
    has_test, has_validation = pools[0].test is not None, pools[0].validation is not None
    width = len(str(count - 1))
    return [
        ClientRows(
            f"client-{k:0{width}d}",
            "mixture",
            "",
            examples[k],
            test[k] if has_test else None,
            validation[k] if has_validation else None,
        )
        for k in range(count)
    ]


def _cut(rows: Sequence[Example], bounds: np.ndarray, shares: list[list[Example]]) -> None:
    ends = [*(int(bound * len(rows)) for bound in bounds[:-1]), len(rows)]
    for share, start, end in zip(shares, [0, *ends[:-1]], ends, strict=True):
        share.extend(rows[start:end])


def safe_id(name: str) -> str:
    """A name as a client id, which names a folder on every system; "" where nothing is left.

    Letters and digits of all scripts stay; blanks and other characters become hyphens.
    """
    plain = unicodedata.normalize("NFC", name)
    plain = re.sub(r"[^\w.-]+", "-", plain).lstrip("-.").rstrip(".")
    plain = plain.rstrip("-") if plain != name else plain
    while len(plain.encode()) > _LONGEST_ID:
        plain = plain[:-1]
    return f"{plain}_" if plain.split(".")[0].lower() in _RESERVED else plain


def _slug(category: str) -> str:
    """A category as part of a client id: letters, digits, dot, underscore, hyphen."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", category).strip("-.") or "category"
