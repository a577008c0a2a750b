"""A data set of the Hugging Face hub, or a local data set folder, whose rows name their client in a column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedmira.config.schema import DataSettings
from fedmira.data.examples import Reading
from fedmira.data.problems import Problems
from fedmira.data.sources.grouping import group_key, tasks_by_key
from fedmira.errors import DataError

__all__ = ["read"]


def read(settings: DataSettings, seed: int) -> Reading:
    """Reads split `settings.split` of the data set `settings.path`; tasks come in order of appearance.

    A local folder may be one that `save_to_disk` wrote, or one of data files (parquet, JSON Lines, CSV).

    Raises:
        DataError: the data set cannot be reached or has no such split; or all problems of its rows, together.
    """
    if not settings.path:
        raise DataError("data.path is empty; hub needs a data set id (owner/name) or a local data set folder")
    table = _load(settings)
    problems = Problems()
    rows = ((f"{settings.path}[{settings.split}] row {number}", row) for number, row in enumerate(table, start=1))
    tasks = tasks_by_key(rows, group_key(settings), settings, seed, problems)
    if not tasks and not len(problems):
        problems.add(f"{settings.path}[{settings.split}]: holds no rows")
    problems.raise_if_any()
    return Reading(tuple(tasks))


def _load(settings: DataSettings) -> Any:
    # Importing datasets takes seconds and every other source does without it.
    import datasets

    folder = Path(settings.path)
    saved = folder.is_dir() and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if not saved:
            return datasets.load_dataset(settings.path, split=settings.split)
        table = datasets.load_from_disk(settings.path)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, IndexError) as error:  # IndexError: saved without rows
        raise DataError(_unreachable(settings, folder, error)) from error
    if not isinstance(table, datasets.DatasetDict):
        return table
    if settings.split not in table:
        raise DataError(f"{settings.path}: no split {settings.split!r}, found {', '.join(table)}; set data.split")
    return table[settings.split]


def _unreachable(settings: DataSettings, folder: Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if folder.is_dir():
        return f"{settings.path}: split {settings.split!r} of this folder cannot be loaded ({reason})"
    return (
        f"data set {settings.path!r}, split {settings.split!r}, cannot be loaded ({reason}); "
        "without a network, pass a local data set folder as data.path"
    )
