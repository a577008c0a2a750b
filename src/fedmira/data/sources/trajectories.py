"""Trajectories of an agent with their sub-goals: rows for a planner, for an executor, or for both.

    {"task": "...", "steps": [{"action", "observation", "reward", "subgoal"}, ...]}

Sub-goal distillation (Hashemzadeh et al. 2024, arXiv 2405.02749) has a large model write a sub-goal
beside each step of a successful trajectory, and a small one imitate both what comes next: a planner
the next sub-goal, an executor the next action. Sub-goals are those of the file; nothing is asked.

Whole trajectories are set aside for testing and validation, so that planner and executor of a file
test on the same ones, and no step of them is trained on by either.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmira.config import DataSettings
from fedmira.config.sections.data import ColumnSettings
from fedmira.data.examples import Example, RawTask, Reading
from fedmira.data.problems import Problems
from fedmira.data.randomness import generator, sample, shuffled
from fedmira.data.sources.layouts import PARTS, rows_of, sorted_out
from fedmira.data.tables import stem_of
from fedmira.data.texts import Row, key_problem, names_of, text_of

__all__ = ["HISTORY", "PLANNER", "EXECUTOR", "Step", "Trajectory", "read", "rows_of_trajectory"]

HISTORY = 10
"""Most steps that a row tells of what was done before."""

PLANNER = "planner"
EXECUTOR = "executor"
_INSTRUCTIONS = {
    PLANNER: "Name the next sub-goal of the task.",
    EXECUTOR: "Name the next action towards the current sub-goal.",
}
_KEYS = ("action", "observation", "reward", "subgoal", "environment", "inventory")
_FEWEST = "at least 2 trajectories are needed, 3 with data.validation_fraction above 0"


@dataclass(frozen=True, slots=True)
class Step:
    """One step: what was aimed at and done, and what came of it.

    Attributes:
        subgoal: what the action works towards.
        action: what was done.
        observation: what was seen after it; may be empty.
        reward: what it earned.
        environment, inventory: what stood around and was held before it; may be empty.
        where: file, line and number of the step, for messages.
    """

    subgoal: str
    action: str
    observation: str
    reward: float
    environment: str = ""
    inventory: str = ""
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A task and the steps by which it was done, in order.

    Attributes:
        task: in words.
        steps: at least one.
        category: of the file's clients, where the row says one.
    """

    task: str
    steps: tuple[Step, ...]
    category: str = field(default="", compare=False)


def read(settings: DataSettings, seed: int) -> Reading:
    """Reads a file of trajectories, or each file of a folder: a planner, an executor, or both.

    Args:
        settings: the [data] section.
        seed: of the run; sides are drawn with it and the file's name only.

    Raises:
        DataError: all problems of all files, together.
    """
    problems = Problems()
    _check(settings, problems)
    skipped: list[str] = []
    notes: list[str] = []
    unread: Counter[str] = Counter()
    tasks: list[RawTask] = []
    for file in _files(settings.path, skipped, problems):
        found = [
            trajectory
            for where, row in rows_of([file], problems, notes)
            if (trajectory := _trajectory(row, where, problems, unread, settings)) is not None
        ]
        distinct = list(dict.fromkeys(found))
        if len(distinct) < len(found):
            skipped.append(f"{file}: {len(found) - len(distinct)} copies of other trajectories")
        tasks += _tasks(stem_of(file), distinct, settings, seed, problems)
    if unread:
        keys = ", ".join(f"{key} ({count} times)" for key, count in unread.most_common())
        notes.append(f"not read, their text reaches no model: {keys}")
    problems.raise_if_any()
    return Reading(tuple(tasks), tuple(skipped), tuple(notes))


def rows_of_trajectory(trajectory: Trajectory, role: str) -> list[Example]:
    """The rows of one trajectory.

    The planner has one at each step that begins a sub-goal, and the executor one at each step.

    Args:
        trajectory: with its sub-goals.
        role: `PLANNER` or `EXECUTOR`.
    """
    rows = []
    completed: list[str] = []
    steps = trajectory.steps
    for number, step in enumerate(steps):
        begins = number == 0 or steps[number - 1].subgoal != step.subgoal
        if begins and number:
            completed.append(steps[number - 1].subgoal)
        if role == PLANNER and not begins:
            continue
        text = _told(trajectory.task, steps[:number], step, completed, role)
        answer = step.subgoal if role == PLANNER else step.action
        rows.append(Example(_INSTRUCTIONS[role], text, answer, where=step.where))
    return rows


def _told(
    task: str, before: Sequence[Step], step: Step, completed: Sequence[str], role: str
) -> str:
    """What a row says of where the agent stands, a line each."""
    score = math.fsum(each.reward for each in before)
    lines = [
        f"Task: {task}",
        f"Time: {len(before)}; score: {score:g}",
        f"Completed sub-goals: {'; '.join(completed) or 'none'}",
    ]
    if role == EXECUTOR:
        lines.append(f"Current sub-goal: {step.subgoal}")
    lines.append("Last steps:" if before else "Last steps: none")
    lines += [
        f"- {each.action} | reward {each.reward:g} | {each.observation or 'nothing seen'}"
        for each in before[-HISTORY:]
    ]
    if step.environment:
        lines.append(f"Environment: {step.environment}")
    if step.inventory:
        lines.append(f"Inventory: {step.inventory}")
    return "\n".join(lines)


def _tasks(
    name: str,
    trajectories: Sequence[Trajectory],
    settings: DataSettings,
    seed: int,
    problems: Problems,
) -> list[RawTask]:
    """The clients of a file, which hold the same trajectories on the same sides."""
    if not trajectories:
        return []
    rng = generator(seed, "sample", name)
    kept = sample(trajectories, settings.sample_fraction, rng, settings.sample_least or 0)
    order = shuffled(kept, generator(seed, "split", name))
    left = 1 - settings.train_fraction - settings.validation_fraction
    tested = max(1, round(len(order) * left))
    chosen = max(1, round(len(order) * settings.validation_fraction))
    chosen = chosen if settings.validation_fraction else 0
    test, validation, train = (
        order[:tested],
        order[tested : tested + chosen],
        order[tested + chosen :],
    )
    if not train:
        problems.add(
            f"{name}: {len(order)} trajectories leave none to train on; whole trajectories are set "
            f"aside for testing, and {_FEWEST}"
        )
        return []
    category = next((each.category for each in trajectories if each.category), name)
    return [
        RawTask(
            name=f"{name}-{role}",
            category=category,
            examples=_rows(train, role),
            test=_rows(test, role),
            validation=_rows(validation, role) if chosen else None,
        )
        for role in (PLANNER, EXECUTOR)
        if settings.emit in (role, "both")
    ]


def _rows(trajectories: Sequence[Trajectory], role: str) -> list[Example]:
    return [row for each in trajectories for row in rows_of_trajectory(each, role)]


def _trajectory(
    row: Row, where: str, problems: Problems, unread: Counter[str], settings: DataSettings
) -> Trajectory | None:
    """The trajectory in a row of a file, or None with a problem noted."""
    before = len(problems)
    task = _line(text_of(row, "task", where, problems))
    if not task and len(problems) == before:
        problems.add(f"{where}: 'task' is empty; a trajectory needs one")
    category = text_of(row, "category", where, problems, optional=True)
    known = {"task", "steps", "category", *settings.ignore}
    unread.update(str(key) for key, value in row.items() if key not in known and value is not None)
    given = row.get("steps")
    if given is None:
        problems.add(key_problem(where, "steps", row))
    elif not isinstance(given, list) or not given:
        problems.add(f"{where}: 'steps' is {_kind(given)}; must be a list of at least one step")
    else:
        steps = [
            _step(step, f"{where} step {number}", problems, unread, settings)
            for number, step in enumerate(given, start=1)
        ]
        if len(problems) == before:
            return Trajectory(task, tuple(step for step in steps if step), category)
    return None


def _step(
    step: Any, where: str, problems: Problems, unread: Counter[str], settings: DataSettings
) -> Step | None:
    if not isinstance(step, dict):
        problems.add(f"{where}: is {_kind(step)}; must be an object with {', '.join(_KEYS[:4])}")
        return None
    before = len(problems)
    texts = {
        key: _line(text_of(step, key, where, problems, optional=key in _KEYS[4:]))
        for key in _KEYS
        if key not in ("reward", "subgoal")
    }
    # Asked for apart: what a teacher has to write, and what a file without one lacks.
    subgoal = step.get("subgoal")
    texts["subgoal"] = _line(subgoal) if isinstance(subgoal, str) else ""
    if not texts["subgoal"]:
        problems.add(
            f"{where}: has no sub-goal, found {names_of(step)}; every step needs the text of the "
            "sub-goal that it works towards under 'subgoal'"
        )
    if not texts["action"] and len(problems) == before:
        problems.add(f"{where}: 'action' is empty; every step needs one")
    unread.update(
        f"step {key}"
        for key, value in step.items()
        if key not in (*_KEYS, *settings.ignore) and value is not None
    )
    reward = _reward(step, where, problems)
    return None if len(problems) > before else Step(reward=reward, where=where, **texts)


def _reward(step: Row, where: str, problems: Problems) -> float:
    value = step.get("reward")
    if value is None:
        problems.add(key_problem(where, "reward", step))
    elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        problems.add(f"{where}: 'reward' is {str(value)[:40]!r}; must be a finite number")
    else:
        return float(value)
    return 0.0


def _files(path: str, skipped: list[str], problems: Problems) -> list[Path]:
    place = Path(path)
    if path and place.is_file():
        return [place]
    if not path or not place.is_dir():
        problems.add(
            f"data.path {path!r} does not exist; trajectories needs a JSON Lines file, or a folder "
            "of such files, one for each planner and executor"
        )
        return []
    files, folders = sorted_out(place, skipped)
    skipped += [
        f"{folder}: a folder; files of trajectories stand side by side" for folder in folders
    ]
    parts = [file.name for file in files if stem_of(file).lower() in PARTS]
    if parts:
        problems.add(
            f"{place}: {', '.join(parts)}: each file is a client's, and the sides are drawn from "
            "its trajectories (data.train_fraction); join the parts in one file, named for the "
            "client"
        )
        return []
    if not files:
        problems.add(f"{place}: holds no file of trajectories; looked for .jsonl")
    return files


def _check(settings: DataSettings, problems: Problems) -> None:
    """Refuses settings that would part the steps of a trajectory, or that nothing reads here."""
    if settings.partition != "task":
        problems.add(
            f"data.partition = {settings.partition!r} deals rows one by one, so that steps of one "
            "trajectory would stand on two sides; source 'trajectories' needs 'task'"
        )
    if settings.columns != ColumnSettings() or settings.instruction:
        problems.add(
            "data.columns and data.instruction are of rows with an instruction; source "
            "'trajectories' does not read them: name the keys of steps "
            f"{', '.join(_KEYS[:4])} in the file"
        )


def _line(text: str) -> str:
    """A text on one line, as each stands on a line of its own in a prompt."""
    return " ".join(text.split())


def _kind(value: object) -> str:
    return "empty" if value in ([], {}, "") else f"of type {type(value).__name__}"
