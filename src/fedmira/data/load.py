"""From the [data] settings to encoded clients: read, partition, split, encode; each stage reports all its problems together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fedmira.config.schema import DataSettings
from fedmira.data.encoding import ClientData, Encoder
from fedmira.data.partition import ClientRows, partition_tasks
from fedmira.data.problems import Problems
from fedmira.data.sources import SOURCES
from fedmira.data.split import split_rows
from fedmira.data.tokenizer import Tokenizer

__all__ = ["ClientSummary", "Dataset", "load_clients"]

_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class ClientSummary:
    """What `fedmira check` says of a client: rows of each part, tokens of the training rows, and what was cut or dropped.

    Attributes:
        longest_row: tokens of the longest row, prompt and response together, of all parts.
    """

    client_id: str
    task: str
    category: str
    train_rows: int
    validation_rows: int
    test_rows: int
    train_tokens: int
    train_response_tokens: int
    longest_row: int
    truncated_prompts: int
    truncated_responses: int
    duplicates: int
    overlaps: int


@dataclass(frozen=True, slots=True)
class Dataset:
    """All clients, sorted by id, and what was left out.

    Attributes:
        skipped: tasks and clients that a rule left out, one "name: reason" each.
    """

    clients: tuple[ClientData, ...]
    skipped: tuple[str, ...] = ()

    def summaries(self) -> tuple[ClientSummary, ...]:
        """One summary for each client, in the same order."""
        return tuple(_summary(client) for client in self.clients)


def load_clients(settings: DataSettings, seed: int, tokenizer: Tokenizer) -> Dataset:
    """Reads the source and makes the clients of a run.

    Args:
        settings: the [data] section.
        seed: of the run; the same settings and seed give the same rows on every machine.
        tokenizer: of the base model.

    Raises:
        DataError: all problems of the first stage that has any.
    """
    encoder = Encoder(tokenizer, settings.prompt, settings.max_length)
    reading = SOURCES[settings.source](settings, seed)
    partition = partition_tasks(reading.tasks, settings, seed)
    rows = sorted(partition.clients, key=lambda client: client.client_id)
    _check_ids(rows)

    problems = Problems()
    splits = [split_rows(client, settings, seed, position, problems) for position, client in enumerate(rows)]
    problems.raise_if_any()
    clients = tuple(encoder.encode_client(client, split, problems) for client, split in zip(rows, splits, strict=True) if split is not None)
    problems.raise_if_any()
    return Dataset(clients, (*reading.skipped, *partition.skipped))


def _check_ids(clients: Sequence[ClientRows]) -> None:
    """Client ids name folders: they must be plain, and differ even where a file system ignores case."""
    problems = Problems()
    folders: dict[str, str] = {}
    for client in clients:
        name = client.client_id
        if not _SAFE.fullmatch(name) or len(name) > 200:
            proposal = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:200] or "client-1"
            problems.add(
                f"client id {name!r} cannot name a folder: use at most 200 letters, digits, '.', '_' and '-', "
                f"and begin with a letter, digit or '_'; for example {proposal!r}"
            )
        if name.casefold() in folders:
            problems.add(f"client ids {folders[name.casefold()]!r} and {name!r} would share a folder where case is ignored; rename one")
        folders[name.casefold()] = name
    problems.raise_if_any()


def _summary(client: ClientData) -> ClientSummary:
    rows = (*client.train, *client.validation, *client.test)
    return ClientSummary(
        client_id=client.client_id,
        task=client.task,
        category=client.category,
        train_rows=len(client.train),
        validation_rows=len(client.validation),
        test_rows=len(client.test),
        train_tokens=client.train_tokens,
        train_response_tokens=client.train_response_tokens,
        longest_row=max(len(row.prompt) + len(row.response) for row in rows),
        truncated_prompts=client.truncated_prompts,
        truncated_responses=client.truncated_responses,
        duplicates=client.duplicates,
        overlaps=client.overlaps,
    )
