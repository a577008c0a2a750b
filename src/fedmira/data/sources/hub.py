"""A data set of the Hugging Face hub, or a local one, that names each row's client in a column.

A local one is a data set folder or a table.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from fedmira.config import DataSettings
from fedmira.data.examples import Reading
from fedmira.data.problems import Problems
from fedmira.data.sources.grouping import group_key, tasks_by_key
from fedmira.errors import DataError

__all__ = ["read"]

_BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}
"""A file's ending -> what `datasets` reads it with."""


def read(settings: DataSettings, seed: int) -> Reading:
    """Reads split `settings.split` of the data set `settings.path`.

    Tasks come in order of appearance.

    A local folder may be one that `save_to_disk` wrote, or one of data files (parquet, JSON Lines,
    CSV); one such file will do, too, and its split is "train".

    Raises:
        DataError: the data set cannot be reached or has no such split; or all problems of its rows,
            together.
    """
    if not settings.path:
        raise DataError(
            "data.path is empty; hub needs a data set id (owner/name), a local data set "
            "folder, or a CSV, parquet or JSON file"
        )
    table = _load(settings)
    problems = Problems()
    rows = (
        (f"{settings.path}[{settings.split}] row {number}", row)
        for number, row in enumerate(table, start=1)
    )
    tasks = tasks_by_key(rows, group_key(settings), settings, seed, problems)
    if not tasks and not len(problems):
        problems.add(f"{settings.path}[{settings.split}]: holds no rows")
    problems.raise_if_any()
    return Reading(tuple(tasks))


def _load(settings: DataSettings) -> Any:
    # Importing datasets takes seconds and every other source does without it.
    import datasets

    folder = Path(settings.path)
    if folder.is_file() and folder.suffix.lower() not in _BUILDERS:
        raise DataError(
            f"{settings.path}: hub reads {', '.join(_BUILDERS)} files; write the table as "
            "one of them"
        )
    saved = folder.is_dir() and any(
        (folder / name).is_file() for name in ("state.json", "dataset_dict.json")
    )
    try:
        if folder.is_file():
            builder = _BUILDERS[folder.suffix.lower()]
            more = _as_text(folder) if builder == "csv" else {}
            return datasets.load_dataset(
                builder, data_files=str(folder), split=settings.split, **more
            )
        if not saved:
            return datasets.load_dataset(settings.path, split=settings.split)
        table = datasets.load_from_disk(settings.path)
    except (
        datasets.exceptions.DatasetsError,
        OSError,
        ValueError,
        RuntimeError,
        IndexError,
    ) as error:  # IndexError: saved without rows
        raise DataError(_unreachable(settings, folder, error)) from error
    if not isinstance(table, datasets.DatasetDict):
        return table
    if settings.split not in table:
        raise DataError(
            f"{settings.path}: no split {settings.split!r}, found {', '.join(table)}; set "
            "data.split"
        )
    return table[settings.split]


def _as_text(path: Path) -> dict[str, Any]:
    """How to read a CSV or TSV file.

    Every cell is the text that stands there, and an empty one is none.
    """
    import datasets

    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as handle:
        names = next(csv.reader(handle, delimiter=separator), [])
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"sep": separator, "features": features, "keep_default_na": False, "na_values": [""]}


def _unreachable(settings: DataSettings, folder: Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if folder.exists():
        what = "folder" if folder.is_dir() else "file"
        return (
            f"{settings.path}: split {settings.split!r} of this {what} cannot be loaded ({reason})"
        )
    return (
        f"data set {settings.path!r}, split {settings.split!r}, cannot be loaded ({reason}); "
        "without a network, pass a local data set folder or file as data.path"
    )
