"""The folder of a run: created once, never overwritten, appended to by resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout

from fedmira.atomic import PARTIAL, replace_file
from fedmira.errors import RunFolderError
from fedmira.shown import csv_text

__all__ = ["RunFolder"]

_HALF_MADE = "config.toml" + PARTIAL
_LOCK = ".lock"


class RunFolder:
    """Paths and writers of a run folder; use `create` or `reopen`.

    Files that grow (events.jsonl, metrics/rounds.csv) are appended line by line; the others are
    replaced whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config_text: str) -> RunFolder:
        """Make a new run folder.

        config.toml is the first thing in it, so that whatever is there can be resumed.

        Args:
            path: of the folder, new or empty.
            config_text: the content of config.toml.

        Raises:
            RunFolderError: the path is taken.
        """
        cls.refuse_taken(path)
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        folder.write_text("config.toml", config_text)
        for part in (folder.metrics, folder.adapters, folder.checkpoint):
            part.mkdir()
        return folder

    @staticmethod
    def refuse_taken(path: Path) -> None:
        """Nothing may be where a run folder is to be made.

        Raises:
            RunFolderError: something is.
        """
        if path.exists() and (
            not path.is_dir() or any(child.name != _HALF_MADE for child in path.iterdir())
        ):
            raise RunFolderError(
                f"{path}: the run folder exists already and is never overwritten; choose "
                "another --output, or continue it with --resume"
            )

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """An existing run folder.

        Raises:
            RunFolderError: there is none.
        """
        if not (path / "config.toml").is_file():
            raise RunFolderError(f"{path}: {_other_than_a_run(path)}")
        return cls(path)

    def not_ended(self) -> str:
        """That the run did not come to its end, as far as run.json says; "" where it did."""
        run = self.read_json("run.json")
        status = run.get("status", "not begun")
        if status in ("finished", "stopped"):
            return ""
        done = run.get("rounds_done")
        after = "" if done is None else f" after round {done}"
        return (
            f"{self.path}: the run has not ended (status: {status}{after}); its adapters are those "
            f"so far; finish it with: fedmira run --resume --output {self.path}"
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within the block no other process may run in this folder.

        The lock is on the file .lock beside config.toml, and goes with the process, however that
        ends; the file itself may stay and says nothing.

        Raises:
            RunFolderError: another process does.
        """
        lock = FileLock(self.path / _LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise RunFolderError(
                f"{self.path}: another process runs in this folder; wait for it, or end "
                "it, before --resume"
            ) from error
        try:
            yield
        finally:
            lock.release()

    @property
    def metrics(self) -> Path:
        """Where the CSV files are."""
        return self.path / "metrics"

    @property
    def adapters(self) -> Path:
        """Where each client's PEFT folder is."""
        return self.path / "adapters"

    @property
    def checkpoint(self) -> Path:
        """The folder that checkpoints are written to."""
        return self.path / "checkpoint"

    @property
    def events(self) -> Path:
        """The file events.jsonl, to which every round adds lines."""
        return self.path / "events.jsonl"

    @property
    def rounds_csv(self) -> Path:
        """The file metrics/rounds.csv, a line for each round."""
        return self.metrics / "rounds.csv"

    def append_events(self, events: Sequence[Mapping[str, object]]) -> None:
        """Add lines to events.jsonl."""
        with self.events.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(event, allow_nan=False) + "\n" for event in events)
            _sync(file)

    def append_round(self, row: Mapping[str, object]) -> None:
        """Add a line to metrics/rounds.csv, with a header where the file is new."""
        new = not self.rounds_csv.exists() or self.rounds_csv.stat().st_size == 0
        self.metrics.mkdir(exist_ok=True)
        with self.rounds_csv.open("a", encoding="utf-8") as file:
            file.write(csv_text(list(row), [row], head=new))
            _sync(file)

    def sizes(self) -> dict[str, int]:
        """Bytes of the growing files, for the checkpoint."""
        return {
            path.name: path.stat().st_size if path.exists() else 0
            for path in (self.events, self.rounds_csv)
        }

    def cut_back(self, sizes: Mapping[str, int]) -> None:
        """Drop lines that were written after a checkpoint, by a round that will be run again."""
        for path in (self.events, self.rounds_csv):
            if path.exists():
                os.truncate(path, sizes.get(path.name, 0))

    def write_table(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Replace metrics/`name` with a CSV of `rows`, which share their keys.

        Args:
            name: of the file.
            rows: column -> cell, in the order of the lines.
        """
        _replace(self.metrics / name, csv_text(list(rows[0]), rows))

    def write_text(self, name: str, text: str) -> None:
        """Replace `name` (relative to the folder).

        Args:
            name: of the file.
            text: its content.
        """
        _replace(self.path / name, text)

    def write_json(self, name: str, value: object) -> None:
        """Replace `name` (relative to the folder) with a JSON document.

        Args:
            name: of the file.
            value: of JSON's types.
        """
        _replace(self.path / name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, object]:
        """A JSON document of the folder, or an empty one where it was never written.

        Raises:
            RunFolderError: it is damaged.
        """
        path = self.path / name
        if not path.exists():
            return {}
        try:
            value: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunFolderError(
                f"{path}: not valid JSON ({error}); restore the file or run again"
            ) from error
        return value


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    replace_file(path, text)


def _sync(file: TextIO) -> None:
    """Have the disk hold what was written; a checkpoint counts on it."""
    file.flush()
    os.fsync(file.fileno())


def _other_than_a_run(path: Path) -> str:
    """What is at a path in place of a run folder, and what to give."""
    if not path.exists():
        return "there is no such folder; give the folder that an earlier run printed"
    inside = sorted(path.glob("*/config.toml")) + sorted(path.glob("*/*/config.toml"))
    if inside:
        return f"this is no run folder but holds runs; give one of them, such as {inside[0].parent}"
    return (
        "this is no run folder (config.toml is missing); give the folder that an earlier run "
        "printed"
    )
