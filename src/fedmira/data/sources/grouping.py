"""Groups the rows of one table into tasks by a key of each row: what dolly, jsonl and hub share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from fedmira.config import DataSettings
from fedmira.data.examples import Example, RawTask
from fedmira.data.problems import Problems
from fedmira.data.randomness import generator, sample
from fedmira.data.rows import (
    KEYS,
    Row,
    RowReader,
    key_problem,
    text_of,
)

__all__ = ["group_key", "sampled", "tables_by_key"]


def group_key(settings: DataSettings) -> str:
    """The key that one table is grouped by.

    The client column, or the category where clients are made from categories.
    """
    return "category" if settings.partition in ("category", "dirichlet") else settings.column


def tables_by_key(
    tables: Mapping[str, Iterable[tuple[str, Row]]],
    key: str,
    settings: DataSettings,
    seed: int,
    problems: Problems,
    reader: RowReader,
) -> tuple[list[RawTask], list[str]]:
    """One task per value of `key`, in order of first appearance, and what was left out.

    A task's category is that of its first row.

    Args:
        tables: part ("train", and perhaps "test" and "validation") -> (place, row) pairs.
        key: of the rows; text or a whole number.
        settings: how many of the rows are used.
        seed: of the run.
        problems: receives what is wrong with single rows.
        reader: makes examples of them.
    """
    parts: dict[str, dict[str, list[Example]]] = {}
    categories: dict[str, str] = {}
    for part, rows in tables.items():
        before, number = len(problems), 0
        groups = parts[part] = {}
        for number, (where, row) in enumerate(rows, start=1):  # noqa: B007
            example = reader.example(row, where)
            if example is None and reader.was_blank:
                continue
            name = _name(row, key, where, problems)
            if name not in categories:
                categories[name] = (
                    name
                    if key == "category"
                    else text_of(row, "category", where, problems, optional=True)
                )
            if example is not None:
                groups.setdefault(name, []).append(example)
        if not number and len(problems) == before and part == "train":
            problems.add("the table holds no rows")
    train = parts.pop("train")
    left = [
        f"{name}: {len(rows)} {part} rows, and no row to train on"
        for part, groups in parts.items()
        for name, rows in groups.items()
        if name not in train
    ]
    tasks = [
        RawTask(
            name,
            categories[name],
            sampled(examples, name, settings, seed),
            parts.get("test", {}).get(name),
            parts.get("validation", {}).get(name),
        )
        for name, examples in train.items()
    ]
    return tasks, left


def sampled(examples: list[Example], name: str, settings: DataSettings, seed: int) -> list[Example]:
    """The share `sample_fraction` of a task's rows, `sample_least` at least.

    The draw depends on the seed and the task's name only.

    Args:
        examples: the rows of the task.
        name: the name of the task or client.
        settings: the [data] section.
        seed: the seed of the run.
    """
    return sample(
        examples,
        settings.sample_fraction,
        generator(seed, "sample", name),
        settings.sample_least or 0,
    )


def _column_hint(key: str, row: Row) -> str:
    """What to set data.column to, from the keys that are not the row's text."""
    others = [] if key in row else [str(other) for other in row if other not in KEYS]
    near = difflib.get_close_matches(key, others, n=1) or (others if len(others) == 1 else [])
    if near:
        return f"did you mean --set data.column={near[0]}?"
    return "data.column names the client column" + (
        f"; is it one of {', '.join(others[:8])}?" if others else ""
    )


def _name(row: Row, key: str, where: str, problems: Problems) -> str:
    value: Any = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None:
        use = (
            "the partition needs a category in every row"
            if key == "category"
            else _column_hint(key, row)
        )
        problems.add(f"{key_problem(where, key, row)}; {use}")
        return ""
    name = text_of(row, key, where, problems)
    if isinstance(value, str) and not name.strip():
        problems.add(f"{where}: {key!r} is empty; every row needs a client")
    return name
