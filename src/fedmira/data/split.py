"""Splits a client's rows into train, validation and test.

The split depends on the seed, the client's id and its rows only.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedmira.config import DataSettings
from fedmira.data.examples import Example, by_prompt
from fedmira.data.partition import ClientRows
from fedmira.data.problems import Problems
from fedmira.data.randomness import generator, shuffled

__all__ = ["Split", "kept_whole", "most_rows", "split_rows"]


@dataclass(frozen=True, slots=True)
class Split:
    """A client's rows, each prompt on one side only.

    Attributes:
        duplicates: exact copies of another row of the same part that were dropped.
        overlaps: training and validation rows that were dropped because the source's own test (or
            validation) rows hold their prompt.
        train: rows, in order, to train on.
        validation: rows to choose settings and checkpoints by.
        test: rows to measure on.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    duplicates: int = 0
    overlaps: int = 0


def most_rows(settings: DataSettings, position: int) -> int:
    """The most training rows of the client at this position (0 = all).

    A list is given to the clients in turn.

    Args:
        settings: the [data] section.
        position: of the client, from 0.
    """
    if isinstance(settings.max_rows, int):
        return settings.max_rows
    return settings.max_rows[position % len(settings.max_rows)] if settings.max_rows else 0


def split_rows(
    client: ClientRows,
    settings: DataSettings,
    seed: int,
    position: int,
    problems: Problems,
    same: Mapping[Hashable, Hashable] | None = None,
) -> Split | None:
    """Splits one client's rows, or notes why it cannot be done.

    Copies are dropped first. Rows with the same prompt form a group, and groups are dealt whole:
    test groups up to the test share of the rows, then validation groups, then the rest trains.
    Neither `test_rows` nor `max_rows` changes which side a row is on; they cut.

    Args:
        client: its rows, and what the source itself sets aside.
        settings: the shares and the limits.
        seed: of the run.
        position: of the client among all clients, for a list of `max_rows`.
        problems: receives a line when the client would have no train, validation or test rows.
        same: prompt -> the prompt it counts as, for prompts that differ and read the same.
    """
    rows = _distinct(client.examples)
    same = same or {}
    parts = _parts(rows, client, settings, generator(seed, "split", client.client_id), same)
    wanted = {"training": parts.train, "test": parts.test} | (
        {"validation": parts.validation} if settings.validation_fraction else {}
    )
    missing = [kind for kind, part in wanted.items() if not part]
    if missing:
        problems.add(_shortage(client, rows, " or ".join(missing), len(wanted), same))
        return None
    copies = sum(
        len(part) - len(_distinct(part))
        for part in (client.examples, client.test or (), client.validation or ())
    )
    return replace(_cut(parts, settings, position), duplicates=copies)


def kept_whole(client: ClientRows) -> Split:
    """All rows train, but for those that the source itself sets aside for testing.

    Rows that the source sets aside for choosing train too.

    Args:
        client: its rows, and what the source itself sets aside.
    """
    given, test = [*client.examples, *(client.validation or ())], _distinct(client.test or ())
    rows = _distinct(given)
    train = [row for group in _without(by_prompt(rows), test, {}) for row in group]
    copies = len(given) - len(rows) + len(client.test or ()) - len(test)
    return Split(tuple(train), (), tuple(test), copies, len(rows) - len(train))


def _parts(
    rows: Sequence[Example],
    client: ClientRows,
    settings: DataSettings,
    rng: np.random.Generator,
    same: Mapping[Hashable, Hashable],
) -> Split:
    """The three parts at full size, and the number of rows that overlap with the source's own."""
    groups = shuffled(by_prompt(rows, same), rng)
    if client.test is not None:
        test = shuffled(_distinct(client.test), rng)
    else:
        test_fraction = 1 - settings.train_fraction - settings.validation_fraction
        test, groups = _take(groups, max(1, _rounded(len(rows) * test_fraction)))
    validation = shuffled(_distinct(client.validation or ()), rng)
    before = sum(len(group) for group in groups) + len(validation)
    groups, validation = (
        _without(groups, test, same),
        [row for group in _without(by_prompt(validation, same), test, same) for row in group],
    )
    if client.validation is not None:
        groups = _without(groups, validation, same)
    overlaps = before - sum(len(group) for group in groups) - len(validation)
    if client.validation is None and settings.validation_fraction:
        share = settings.validation_fraction / (
            settings.train_fraction + settings.validation_fraction
        )
        validation, groups = _take(
            groups, max(1, _rounded(sum(len(group) for group in groups) * share))
        )
    return Split(
        tuple(row for group in groups for row in group),
        tuple(validation),
        tuple(test),
        overlaps=overlaps,
    )


def _cut(parts: Split, settings: DataSettings, position: int) -> Split:
    limit = most_rows(settings, position)
    validation = parts.validation
    if limit and settings.validation_fraction:
        validation = validation[
            : max(1, _rounded(limit * settings.validation_fraction / settings.train_fraction))
        ]
    return replace(
        parts,
        train=parts.train[: limit or None],
        validation=validation,
        test=parts.test[: settings.test_rows or None],
    )


def _shortage(
    client: ClientRows,
    rows: Sequence[Example],
    missing: str,
    parts: int,
    same: Mapping[Hashable, Hashable],
) -> str:
    prompts = len(by_prompt(rows, same))
    read = " (some prompts differ in the file and are the same tokens to the model)" if same else ""
    return (
        f"client {client.client_id!r} has no {missing} rows left: it has {len(rows)} "
        f"distinct rows with {prompts} distinct prompts{read}, and a "
        f"prompt stays on one side (a source's own test rows first); at least {parts} "
        "prompts that differ are needed: add rows, or "
        "leave the client out with data.min_rows"
    )


def _rounded(value: float) -> int:
    """To the nearest whole number, halves up.

    Products of fractions such as (1 - 0.8) * n are a hair off their true value.
    """
    return math.floor(value + 0.5 + 1e-9)


def _distinct(rows: Iterable[Example]) -> list[Example]:
    """The rows without copies, in their first order; `where` plays no part in the comparison."""
    return list(dict.fromkeys(rows))


def _take(
    groups: Sequence[list[Example]], target: int
) -> tuple[list[Example], list[list[Example]]]:
    """Whole groups, in order, as long as they fit into `target` rows.

    Where none fits, the smallest; and the groups that are left.
    """
    taken: list[int] = []
    size = 0
    for index, group in enumerate(groups):
        if size + len(group) <= target:
            taken.append(index)
            size += len(group)
    if not taken and groups:
        taken = [min(range(len(groups)), key=lambda index: len(groups[index]))]
    chosen = set(taken)
    return [row for index in taken for row in groups[index]], [
        group for index, group in enumerate(groups) if index not in chosen
    ]


def _without(
    groups: Sequence[list[Example]],
    rows: Sequence[Example],
    same: Mapping[Hashable, Hashable],
) -> list[list[Example]]:
    prompts = {same.get(row.prompt, row.prompt) for row in rows}
    return [group for group in groups if same.get(group[0].prompt, group[0].prompt) not in prompts]
