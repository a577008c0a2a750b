"""Natural Instructions v2 in its original task files, prepared by FedKSeed's rules.

Those are the rules of Qin et al., arXiv 2312.06353.

A row stays when its input has fewer than `input_limit` characters; a task stays when at least 20
rows do; of these int(f * n) are drawn; the instruction is the first definition and the response the
first output. Each task file is one task.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmira.config import DataSettings
from fedmira.data.examples import Example, RawTask, Reading
from fedmira.data.files import read_json, read_text
from fedmira.data.problems import Problems
from fedmira.data.rows import key_problem, text_of
from fedmira.data.sources.grouping import sampled

__all__ = ["FEWEST_ROWS", "read"]

FEWEST_ROWS = 20
_OFFICIAL_LIST = Path("splits") / "default" / "train_tasks.txt"


def read(settings: DataSettings, seed: int) -> Reading:
    """Read the task files under `settings.path`.

    They come in the order of the task list, or of their numbers where there is no list.

    With `partition = "task"` and a number of clients, reading ends when so many usable tasks are
    found.

    Args:
        settings: the [data] section.
        seed: the seed of the run.

    Raises:
        DataError: all problems of the files that were read, together.
    """
    problems = Problems()
    skipped: list[str] = []
    tasks: list[RawTask] = []
    wanted = settings.clients if settings.partition == "task" else 0
    for path in _task_files(settings, skipped, problems):
        task, reason = _read_task(path, settings, seed, problems)
        if task is not None:
            tasks.append(task)
        elif reason:
            skipped.append(reason)
        if wanted and len(tasks) == wanted:
            break
    problems.raise_if_any()
    return Reading(tuple(tasks), tuple(skipped))


def _task_files(settings: DataSettings, skipped: list[str], problems: Problems) -> list[Path]:
    root = Path(settings.path)
    if not settings.path or not root.is_dir():
        problems.add(
            f"data.path {settings.path!r} is not a folder; natural-instructions needs one "
            "with task*.json files in it or in its tasks/"
        )
        return []
    folder = root / "tasks" if (root / "tasks").is_dir() else root
    found = {path.stem: path for path in sorted(folder.glob("*.json"), key=_number)}
    if not found:
        problems.add(f"{folder}: no task files; looked for *.json")
        return []
    official = folder.parent / _OFFICIAL_LIST
    if settings.split_list:
        return _listed(Path(settings.split_list), found, problems)
    if not official.is_file():
        return list(found.values())
    names = _names(official, problems)
    missing = [name for name in names if name not in found]
    if missing:
        skipped.append(
            f"{official}: {len(missing)} of its {len(names)} tasks have no file in {folder}"
        )
    return [found[name] for name in names if name in found]


def _listed(path: Path, found: Mapping[str, Path], problems: Problems) -> list[Path]:
    names = _names(path, problems)
    for name in names:
        if name not in found:
            problems.add(f"{path}: task {name!r} has no file; looked for {name}.json")
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.add(f"{path}: task {name!r} is listed {names.count(name)} times; list it once")
    return [found[name] for name in names if name in found]


def _names(path: Path, problems: Problems) -> list[str]:
    text = read_text(path, problems)
    names = (
        [line.strip().removesuffix(".json") for line in text.splitlines() if line.strip()]
        if text is not None
        else []
    )
    if text is not None and not names:
        problems.add(f"{path}: lists no task; one task name a line is expected")
    return names


def _number(path: Path) -> tuple[int, str]:
    match = re.match(r"task(\d+)", path.stem)
    return (int(match.group(1)) if match else 10**9, path.stem)


def _read_task(
    path: Path, settings: DataSettings, seed: int, problems: Problems
) -> tuple[RawTask | None, str]:
    content = read_json(path, problems)
    if content is None:
        return None, ""
    before = len(problems)
    definition = _first(content, "Definition", str(path), problems)
    category = _first(content, "Categories", str(path), problems)
    instances = content.get("Instances")
    if not isinstance(instances, list):
        problems.add(
            key_problem(str(path), "Instances", content)
            if instances is None
            else f"{path}: 'Instances' must be a list"
        )
        return None, ""
    examples = []
    for number, instance in enumerate(instances, start=1):
        example = _read_instance(
            instance, definition, f"{path}, instance {number}", settings.input_limit, problems
        )
        if example is not None:
            examples.append(example)
    if len(problems) > before:
        return None, ""
    fewest = max(settings.min_rows, FEWEST_ROWS)
    if len(examples) < fewest:
        left = f"{len(examples)} rows with fewer than {settings.input_limit} characters of input"
        return None, f"{path.stem}: {left}; at least {fewest} are needed"
    drawn = sampled(examples, path.stem, settings, seed)
    if len(drawn) < settings.min_rows:
        return (
            None,
            f"{path.stem}: {len(drawn)} rows after data.sample_fraction; data.min_rows is "
            f"{settings.min_rows}",
        )
    return RawTask(path.stem, category, drawn), ""


def _read_instance(
    instance: Any, definition: str, where: str, input_limit: int, problems: Problems
) -> Example | None:
    if not isinstance(instance, dict):
        problems.add(
            f"{where}: is of type {type(instance).__name__}; must be an object with "
            "'input' and 'output'"
        )
        return None
    before = len(problems)
    material = text_of(instance, "input", where, problems)
    if len(material) >= input_limit:
        return None
    output = _first(instance, "output", where, problems)
    if len(problems) == before and not output.strip():
        problems.add(f"{where}: empty response; a row needs text to learn")
    return Example(definition, material, output, where=where) if len(problems) == before else None


def _first(row: Mapping[str, Any], key: str, where: str, problems: Problems) -> str:
    """The first text of a list; some releases hold a plain text in its place."""
    value = row.get(key)
    if isinstance(value, list) and value:
        return text_of({key: value[0]}, key, where, problems)
    if isinstance(value, list):
        problems.add(f"{where}: {key!r} is an empty list")
        return ""
    return text_of(row, key, where, problems)
