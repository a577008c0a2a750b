"""A data set of the Hugging Face hub, or a local one, that names each row's client in a column.

A local one is a data set folder or a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedmira.config import DataSettings
from fedmira.data.examples import Reading
from fedmira.data.guarded import lethal
from fedmira.data.problems import Problems
from fedmira.data.rows import Row, RowReader
from fedmira.data.sources.grouping import group_key, tables_by_key
from fedmira.data.sources.layouts import PARTS, parts_of, rows_of, sorted_out
from fedmira.data.tables import ENDINGS, ending_of
from fedmira.errors import DataError

__all__ = ["read"]

Tables = dict[str, Iterable[tuple[str, Row]]]
_SAVED = ("state.json", "dataset_dict.json")


def read(settings: DataSettings, seed: int) -> Reading:
    """Reads split `settings.split` of the data set `settings.path`.

    Beside the split "train", those for test and validation are read as such. Tasks come in order of
    appearance.

    A local folder may be one that `save_to_disk` wrote, or one of data files; one such file will
    do, too, and its split is "train".

    Args:
        settings: the [data] section.
        seed: the seed of the run.

    Raises:
        DataError: the data set cannot be reached or has no such split; or all problems of its rows,
            together.
    """
    if not settings.path:
        raise DataError(
            "data.path is empty; hub needs a data set id (owner/name), a local data set "
            "folder, or a CSV, parquet or JSON file"
        )
    problems = Problems()
    reader = RowReader(settings, problems)
    skipped: list[str] = []
    notes: list[str] = []
    tables = _tables(settings, problems, skipped, notes)
    tasks, left = tables_by_key(tables, group_key(settings), settings, seed, problems, reader)
    if not tasks and not len(problems):
        problems.add(f"{settings.path}[{settings.split}]: holds no rows")
    bad, said = reader.finish()
    problems.raise_if_any()
    return Reading(tuple(tasks), (*skipped, *left, *bad), (*notes, *said))


def _tables(
    settings: DataSettings, problems: Problems, skipped: list[str], notes: list[str]
) -> Tables:
    """Part -> its rows with their places."""
    place = Path(settings.path)
    if place.is_file() and not ending_of(place):
        raise DataError(
            f"{settings.path}: hub reads {', '.join(ENDINGS)} files, also with .gz; write the "
            "table as one of them"
        )
    saved = place.is_dir() and any((place / name).is_file() for name in _SAVED)
    files: dict[str, list[Path]] = {}
    if place.is_file():
        files = {"train": [place]}
    elif place.is_dir() and not saved:
        tables, folders = sorted_out(place, skipped)
        for folder in folders:
            tables += sorted_out(folder, skipped)[0]
        files = parts_of(tables, "train")
    if files:
        chosen = _chosen(list(files), settings, notes)
        return {part: rows_of(files[split], problems, notes) for part, split in chosen.items()}
    splits = _load(settings, saved)
    chosen = _chosen(list(splits), settings, notes)
    return {part: _placed(settings, split, splits[split]) for part, split in chosen.items()}


def _placed(settings: DataSettings, split: str, table: Any) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(table, start=1):
        yield f"{settings.path}[{split}] row {number}", row


def _chosen(splits: list[str], settings: DataSettings, notes: list[str]) -> dict[str, str]:
    """Part -> the split that gives it."""
    if settings.split not in splits:
        raise DataError(
            f"{settings.path}: no split {settings.split!r}, found {', '.join(splits) or 'none'}; "
            "set data.split"
        )
    chosen = {"train": settings.split}
    if settings.split == "train":
        chosen |= {part: part for part in PARTS[1:] if part in splits}
    unread = [split for split in splits if split not in chosen.values()]
    if unread:
        notes.append(f"{settings.path}: the splits {', '.join(unread)} are not read")
    used = [split for part, split in chosen.items() if part != "train"]
    if used:
        notes.append(f"{settings.path}: the splits {', '.join(used)} are used as such")
    return chosen


def _load(settings: DataSettings, saved: bool) -> Mapping[str, Any]:
    """Split -> its table, of a data set of the hub or one that `save_to_disk` wrote."""
    if reason := lethal("saved" if saved else "hub", settings.path):
        raise DataError(
            f"{settings.path}: the data set cannot be read ({reason}); its files are damaged: save "
            "or download it again"
        )
    # Importing datasets takes seconds and every other source does without it.
    import datasets

    try:
        table = (
            datasets.load_from_disk(settings.path)
            if saved
            else datasets.load_dataset(settings.path)
        )
    except (
        datasets.exceptions.DatasetsError,
        OSError,
        ValueError,
        RuntimeError,
        IndexError,
    ) as error:  # IndexError: saved without rows
        raise DataError(_unreachable(settings, Path(settings.path), error)) from error
    found: Mapping[str, Any] = (
        table if isinstance(table, datasets.DatasetDict) else {settings.split: table}
    )
    return found


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
