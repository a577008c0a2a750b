"""From the [data] settings to rows in three parts, before any tokenizer has seen them.

It takes no model and not even torch, so that a row that cannot be used is told at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from fedmira.config import DataSettings
from fedmira.data.from_objects import OBJECT, ObjectRows
from fedmira.data.partition import ClientRows, partition_tasks, safe_id
from fedmira.data.problems import Problems
from fedmira.data.sources import reader
from fedmira.data.sources.jsonl import read_own
from fedmira.data.split import Split, split_rows
from fedmira.errors import DataError

__all__ = [
    "LEFT_OUT",
    "ReadRows",
    "check_ids",
    "id_problem",
    "read_all",
    "read_one",
    "read_rows",
    "split_all",
    "told_left_out",
]

LEFT_OUT = "left out: "
"""How a note begins that tells what of the source no client has."""

_MOST_TOLD = 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReadRows:
    """The rows of all clients as they stand in the source.

    Attributes:
        clients: sorted by id.
        splits: the parts of each, in the same order.
        seed: that they were drawn and split with.
        skipped: tasks and clients that a rule left out, one "name: reason" each.
        notes: what was done to the rows that the user should know, a sentence each.
    """

    clients: tuple[ClientRows, ...]
    splits: tuple[Split, ...]
    seed: int
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_rows(settings: DataSettings, seed: int, rows: ObjectRows | None = None) -> ReadRows:
    """Read the source, give its rows to clients, and split them.

    Logs what was left out and what was done to the rows, which is also kept.

    Args:
        settings: the [data] section.
        seed: of the run; the same settings and seed give the same rows on every machine.
        rows: of a run whose rows are objects.

    Raises:
        DataError: all problems of the first stage that has any.
    """
    clients, skipped, notes = read_all(settings, seed, rows)
    check_ids(clients)
    for note in (*told_left_out(skipped), *notes):
        _log.warning("%s", note)
    return ReadRows(tuple(clients), split_all(clients, settings, seed), seed, skipped, notes)


def told_left_out(skipped: Sequence[str]) -> list[str]:
    """What a rule left out as lines for a reader; of very many, the first and how many more.

    Args:
        skipped: "name: reason" each.
    """
    told = [f"{LEFT_OUT}{each}" for each in skipped[:_MOST_TOLD]]
    if more := len(skipped) - len(told):
        told.append(f"{LEFT_OUT}{more} more; fedmira check --format json lists all as skipped")
    return told


def read_all(
    settings: DataSettings, seed: int, rows: ObjectRows | None = None
) -> tuple[list[ClientRows], tuple[str, ...], tuple[str, ...]]:
    """All clients of the source, sorted by id, what was left out, and what is to be said.

    Args:
        settings: the [data] section.
        seed: of the run.
        rows: of a run whose rows are objects.

    Raises:
        DataError: the source cannot be read, or rows of it are wrong.
    """
    if settings.source == OBJECT:
        reading = _given(settings, rows).reading(settings, seed)
    else:
        reading = reader(settings.source)(settings, seed)
    partition = partition_tasks(reading.tasks, settings, seed)
    return (
        sorted(partition.clients, key=lambda client: client.client_id),
        (*reading.skipped, *partition.skipped),
        (*reading.notes, *partition.notes),
    )


def read_one(
    settings: DataSettings, seed: int, name: str, rows: ObjectRows | None = None
) -> tuple[ClientRows, tuple[str, ...], tuple[str, ...]]:
    """The rows of one client by itself, what was left out, and what is to be said.

    Args:
        settings: the [data] section, with the path of the client's rows.
        seed: of the run.
        name: what the client is called, whatever it is called there.
        rows: where they are objects.

    Raises:
        DataError: the source cannot be read, or holds several clients and none of this name.
    """
    # How a run deals and thins the rows of all its clients says nothing of these few.
    changes = {"clients": 0, "partition": "task", "min_rows": 1, "sample_fraction": 1.0}
    settings = settings.model_copy(update=changes)
    if settings.source == OBJECT:
        reading = _given(settings, rows).reading(settings, seed)
    elif settings.source == "jsonl":
        reading = read_own(settings, seed, name)
    else:
        reading = reader(settings.source)(settings, seed)
    found = [task for task in reading.tasks if task.name == name] or reading.tasks
    if len(found) != 1:
        held = ", ".join(task.name for task in reading.tasks[:8])
        raise DataError(
            f"{settings.path or 'the rows'}: holds {len(reading.tasks)} clients, and none is "
            f"called {name!r}; {f'it holds {held}: ' if held else ''}give the rows of one"
        )
    (task,) = found
    client = ClientRows(
        client_id=name,
        task=task.name,
        category=task.category,
        examples=task.examples,
        test=task.test,
        validation=task.validation,
    )
    return client, reading.skipped, reading.notes


def split_all(
    clients: Sequence[ClientRows], settings: DataSettings, seed: int
) -> tuple[Split, ...]:
    """The parts of each client.

    Args:
        clients: their order decides which entry of a list of `max_rows` each is given.
        settings: the shares and the limits.
        seed: of the run.

    Raises:
        DataError: clients would have no rows in one of the parts.
    """
    problems = Problems()
    splits = [
        split_rows(client, settings, seed, position, problems)
        for position, client in enumerate(clients)
    ]
    problems.raise_if_any()
    return tuple(split for split in splits if split is not None)


def _given(settings: DataSettings, rows: ObjectRows | None) -> ObjectRows:
    """The rows that were given as objects.

    Raises:
        DataError: there are none, or they are not those that the settings name.
    """
    if rows is None:
        raise DataError(
            "data.source = 'object': the rows of this run were objects of Python, which no "
            "file holds; give "
            "them again: fedmira.run(clients=...) or fedmira.load(folder, clients=...)"
        )
    if settings.sha256 is not None and settings.sha256 != rows.sha256:
        raise DataError(
            f"clients: these are not the rows of the run (sha256 {rows.sha256[:12]}, the run has "
            f"{settings.sha256[:12]}); give the rows that it was made with, or begin a new run"
        )
    return rows


def check_ids(clients: Sequence[ClientRows]) -> None:
    """Refuse client ids that cannot name folders.

    They must be plain, and differ even where a file system ignores case.

    Args:
        clients: all of a run.

    Raises:
        DataError: with all ids that cannot be used.
    """
    problems = Problems()
    folders: dict[str, str] = {}
    for client in clients:
        name = client.client_id
        if problem := id_problem(name):
            problems.add(problem)
        if name.casefold() in folders:
            problems.add(
                f"client ids {folders[name.casefold()]!r} and {name!r} would share a "
                "folder where case is ignored; rename one"
            )
        folders[name.casefold()] = name
    problems.raise_if_any()


def id_problem(name: str) -> str:
    """Why this cannot be a client's id, which names a folder; "" where it can."""
    if name and safe_id(name) == name:
        return ""
    proposal = safe_id(name) or "client-1"
    return (
        f"client id {name[:200]!r} cannot name a folder: use at most 200 letters, digits, "
        "'.', '_' and '-', "
        f"and begin with a letter, digit or '_'; for example {proposal!r}"
    )
