"""databricks-dolly-15k in its original JSON Lines form: instruction, context, response, category.

One task per category.
"""

from __future__ import annotations

from pathlib import Path

from fedmira.config import DataSettings
from fedmira.data.examples import Reading
from fedmira.data.files import read_json_lines
from fedmira.data.problems import Problems
from fedmira.data.rows import Row, RowReader, key_problem
from fedmira.data.sources.grouping import tables_by_key

__all__ = ["read"]

_KEYS = ("instruction", "context", "response", "category")


def read(settings: DataSettings, seed: int) -> Reading:
    """Reads the file `settings.path`, or the one *.jsonl file in that folder.

    Tasks come sorted by category.

    Args:
        settings: the [data] section.
        seed: the seed of the run.

    Raises:
        DataError: all problems of the file, together.
    """
    problems = Problems()
    path = _file(settings.path, problems)
    rows: list[tuple[str, Row]] = []
    if path is not None:
        before = len(problems)
        for number, row in read_json_lines(path, problems):
            where = f"{path}:{number}"
            missing = [key for key in _KEYS if key not in row]
            for key in missing:
                problems.add(key_problem(where, key, row))
            if not missing:
                rows.append((where, row))
        if not rows and len(problems) == before:
            problems.add(f"{path}: holds no rows")
    reader = RowReader(settings, problems)
    tasks = (
        tables_by_key({"train": rows}, "category", settings, seed, problems, reader)[0]
        if rows
        else []
    )
    skipped, notes = reader.finish()
    problems.raise_if_any()
    ordered = sorted(tasks, key=lambda task: task.name)
    return Reading(tuple(ordered), tuple(skipped), tuple(notes))


def _file(path: str, problems: Problems) -> Path | None:
    place = Path(path)
    if path and place.is_file():
        return place
    if not path or not place.is_dir():
        problems.add(
            f"data.path {path!r} does not exist; dolly needs its .jsonl file, or a folder "
            "that holds it"
        )
        return None
    found = sorted(place.glob("*.jsonl"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        problems.add(
            f"{place}: looked for one *.jsonl file, found {names}; set data.path to the file"
        )
        return None
    return found[0]
