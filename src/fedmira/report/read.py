"""Reads a run folder into records; damage is named with file and line."""

from __future__ import annotations

import csv
import io
import json
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from fedmira.errors import RunFolderError
from fedmira.metrics import TEXT_METRICS
from fedmira.records import RecordedFolder, lost_lines
from fedmira.report.records import (
    Client,
    Event,
    Round,
    Run,
    TaskGraph,
    ValidationRow,
)

__all__ = ["read_run"]

STATUSES = ("finished", "stopped", "interrupted", "failed", "running")
REQUIRED_KEYS = {
    "train": "client",
    "align": "client",
    "evaluate": "client",
    "join": "client",
    "failure": "reason",
    "warning": "message",
}


@dataclass(slots=True)
class _Reading:
    """Collects problems and notes while reading.

    A problem is a damaged folder, a note is something small that was left out.
    """

    folder: Path
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def recorded(self) -> RecordedFolder:
        """The folder's files, compared with their hashes."""
        return RecordedFolder(self.folder)

    def problem(self, where: str, message: str) -> None:
        """Records damage at a file and line of the folder."""
        self.problems.append(f"{self.folder / where}: {message}")


def read_run(run_folder: Path) -> Run:
    """Reads a run folder.

    Args:
        run_folder: of a run that finished, failed or is still running; one that did not finish may
            lack metrics and events.

    Returns:
        The run. A last line of events.jsonl that a crash cut off and numbers that are not finite
        are left out and named in `notes`.

    Raises:
        RunFolderError: the folder or a needed file is missing, or a file is damaged; all problems
            together, each with file and line.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such run folder; give the folder that holds run.json")
    reading = _Reading(folder)
    reading.problems += [f"{problem}; put it back from a copy" for problem in lost_lines(folder)]
    settings_text = _text(reading, "config.toml", needed=True)
    settings = _parsed(reading, "config.toml", settings_text, tomllib.loads)
    provenance = _json_object(reading, "run.json", needed=True)
    status = provenance.get("status")
    if provenance and status not in STATUSES:
        reading.problem("run.json", f"status is {status!r}; must be one of {', '.join(STATUSES)}")
    finished = status == "finished"
    run = Run(
        folder=folder,
        settings=settings,
        settings_text=settings_text,
        provenance=provenance,
        status=str(status),
        error=str(provenance.get("error") or ""),
        started=_started(reading, provenance),
        summary=_summary(reading, provenance),
        clients=tuple(_table(reading, "metrics/clients.csv", Client, needed=finished)),
        validation=tuple(_table(reading, "metrics/validation.csv", ValidationRow, needed=False)),
        rounds=tuple(
            sorted(
                _table(reading, "metrics/rounds.csv", Round, needed=finished),
                key=lambda row: row.round,
            )
        ),
        events=_events(reading, needed=finished),
        graph=_graph(reading),
        adapters={
            k: v
            for k, v in _json_object(reading, "adapters/index.json", needed=False).items()
            if isinstance(v, dict)
        },
        notes=tuple(reading.notes),
    )
    if reading.problems:
        raise RunFolderError(reading.problems)
    return run


def _text(reading: _Reading, name: str, needed: bool) -> str:
    try:
        if reading.recorded.exists(name):
            return reading.recorded.read(name).decode("utf-8")
        if needed:
            reading.problem(
                name, "missing; is this a run folder, and did the run get as far as writing it?"
            )
        return ""
    except RunFolderError as error:
        reading.problems += error.problems
        return ""
    except UnicodeDecodeError as error:
        reading.problem(
            name, f"not UTF-8 text at byte {error.start}; restore the file or run again"
        )
        return ""


def _parsed(reading: _Reading, name: str, text: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = parse(text)
    except ValueError as error:  # tomllib's and json's errors are ValueErrors that name the line
        reading.problem(name, f"cannot be read ({error}); restore the file or run again")
        return {}
    if not isinstance(value, dict):
        reading.problem(name, f"holds a {type(value).__name__}; must hold one object")
        return {}
    return value


def _json_object(reading: _Reading, name: str, needed: bool) -> dict[str, Any]:
    text = _text(reading, name, needed)
    if not text.strip() and (reading.folder / name).is_file():
        reading.problem(name, "empty; restore the file or run again")
        return {}
    return _parsed(reading, name, text, json.loads)


def _started(reading: _Reading, provenance: Mapping[str, Any]) -> datetime | None:
    started = provenance.get("started")
    if started is None:
        return None
    try:
        return datetime.fromisoformat(str(started))
    except ValueError:
        reading.problem("run.json", f"started is {started!r}; must be an ISO 8601 date and time")
        return None


def _summary(reading: _Reading, provenance: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Keeps the finite numbers of every figure; a figure without any is left out."""
    summary = provenance.get("summary") or {}
    if not isinstance(summary, dict) or not all(
        isinstance(figure, dict) for figure in summary.values()
    ):
        reading.problem("run.json", "summary must map each figure to its statistics")
        return {}
    kept = {
        name: _finite(reading, f"run.json, summary.{name}", figure)
        for name, figure in summary.items()
    }
    return {name: figure for name, figure in kept.items() if figure}


def _finite(reading: _Reading, where: str, values: Mapping[str, Any]) -> dict[str, float]:
    numbers = {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    for key, value in numbers.items():
        if not math.isfinite(value):
            reading.notes.append(f"{where}: {key} is {value}; left out")
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


RowType = TypeVar("RowType", Client, Round, ValidationRow)


def _table(reading: _Reading, name: str, row_type: type[RowType], needed: bool) -> list[RowType]:
    """Reads a CSV file whose columns are the fields of `row_type`.

    The first field must be there, further columns are ignored.
    """
    text = _text(reading, name, needed)
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", restval="")
    key = fields(row_type)[0].name
    if text and key not in (reader.fieldnames or ()):
        reading.problem(
            f"{name} line 1",
            f"has no column {key!r}; the columns are {', '.join(reader.fieldnames or ())}",
        )
        return []
    rows = []
    for cells in reader:
        values: dict[str, Any] = {}
        where = f"{name} line {reader.line_num}"
        for column in fields(row_type):
            cell = cells.get(column.name) or ""
            if column.name == "scores":
                values[column.name] = _scores(reading, where, cells)
            elif column.type == "str":
                values[column.name] = cell
            elif cell:
                values[column.name] = _number(reading, where, column.name, cell)
        if values.get(key) in (None, ""):
            reading.problem(where, f"{key} is empty; every row needs one")
            continue
        rows.append(row_type(**values))
    return rows


def _scores(reading: _Reading, where: str, cells: Mapping[str, str]) -> dict[str, float]:
    """The text metrics that a row of clients.csv has a finite number of."""
    found = {
        name: _number(reading, where, name, cell)
        for name in TEXT_METRICS
        if (cell := cells.get(name))
    }
    return {name: value for name, value in found.items() if value is not None}


def _number(reading: _Reading, where: str, column: str, cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        reading.problem(where, f"{column} is {cell!r}; must be a number or empty")
        return None
    if math.isfinite(value):
        return value
    reading.notes.append(f"{where}: {column} is {cell}; left out")
    return None


def _events(reading: _Reading, needed: bool) -> tuple[Event, ...]:
    text = _text(reading, "events.jsonl", needed)
    lines = text.split("\n")
    torn = (
        lines.pop()
    )  # what follows the last newline: nothing, unless the run was stopped while it wrote
    if torn and _is_json(torn):
        lines.append(torn)
    elif torn:
        reading.notes.append(
            f"events.jsonl line {len(lines) + 1}: cut off while it was written; left out"
        )
    events = []
    for number, line in enumerate(lines, start=1):
        where = f"events.jsonl line {number}"
        raw = _parsed(reading, where, line, json.loads)
        if not raw:
            continue
        kind, round_number = raw.get("event"), raw.get("round")
        if not isinstance(kind, str) or not isinstance(round_number, int):
            reading.problem(
                where,
                f"event is {kind!r} and round is {round_number!r}; must be a text and a "
                "whole number",
            )
            continue
        required = REQUIRED_KEYS.get(kind)
        if required is not None and not isinstance(raw.get(required), str):
            reading.problem(where, f"a {kind!r} event without {required!r}")
            continue
        texts = {key: value for key, value in raw.items() if isinstance(value, str)}
        owner = f"{where} ({kind}, {texts['client']})" if "client" in texts else f"{where} ({kind})"
        events.append(
            Event(kind, round_number, texts.get("client", ""), _finite(reading, owner, raw), texts)
        )
    return tuple(events)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _graph(reading: _Reading) -> TaskGraph | None:
    raw = _json_object(reading, "graph.json", needed=False)
    if not raw:
        return None
    clients = raw.get("clients")
    edges = raw.get("edges")
    if not isinstance(clients, list) or not isinstance(edges, list):
        reading.problem("graph.json", "clients and edges must be lists")
        return None
    known = set(map(str, clients))
    kept = []
    for position, edge in enumerate(edges):
        weight = edge.get("weight") if isinstance(edge, dict) else None
        if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
            reading.problem(
                "graph.json", f"edge {position} has weight {weight!r}; must be 0 or more"
            )
        elif not {str(edge.get("source")), str(edge.get("target"))} <= known:
            reading.problem(
                "graph.json",
                f"edge {position} joins {edge.get('source')!r} and {edge.get('target')!r}; "
                "both must be in clients",
            )
        elif weight > 0 and edge["source"] != edge["target"]:
            kept.append((str(edge["source"]), str(edge["target"]), float(weight)))
    return TaskGraph(str(raw.get("kind", "")), tuple(map(str, clients)), tuple(kept))
