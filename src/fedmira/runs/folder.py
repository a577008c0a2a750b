"""The folder of a run: created once, never overwritten, appended to by resume."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedmira.atomic import PARTIAL
from fedmira.errors import MachineError, RunFolderError
from fedmira.records import RECORD, GrowingFile, RecordedFolder, machine_errors, told
from fedmira.shown import csv_text

__all__ = ["RunFolder"]

_CONFIG = "config.toml"
_BEGUN = frozenset({_CONFIG + PARTIAL, RECORD, RECORD + PARTIAL})
"""What is there before config.toml is: a folder with nothing else is as good as empty."""
_LOCK = ".lock"
_PRIVATE = 0o700
_OF_RESULTS = ("adapters/", "metrics/", "report.html")
_SAVED_AGAIN = (
    "save it again from the checkpoint with: fedmira run --resume --output FOLDER, or put it back "
    "from a copy"
)
_log = logging.getLogger("fedmira")
_GROWING = ("events.jsonl", "metrics/rounds.csv")


class RunFolder:
    """Paths, writers and readers of a run folder; use `create` or `reopen`.

    Files that grow (events.jsonl, metrics/rounds.csv) are appended line by line; the others are
    replaced whole. What is read must have the SHA-256 with which it was written.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recorded = RecordedFolder(path)
        self._saved = RecordedFolder(path, _SAVED_AGAIN)
        self._grown = {name: GrowingFile(path / name) for name in _GROWING}

    @classmethod
    def create(cls, path: Path, config_text: str) -> RunFolder:
        """Make a new run folder.

        config.toml is the first thing in it, so that whatever is there can be resumed. The folder
        is for this user's eyes: what adapters and memories have learned is in it.

        Args:
            path: of the folder, new or empty.
            config_text: the content of config.toml.

        Raises:
            RunFolderError: the path is taken.
            MachineError: it cannot be made.
        """
        cls.refuse_taken(path)
        folder = cls(path)
        with machine_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=_PRIVATE, exist_ok=True)
            folder.write_text(_CONFIG, config_text)
            folder.make_parts()
        return folder

    def make_parts(self) -> None:
        """Make the folders in it, as far as whoever began it was ended before."""
        for part in (self.metrics, self.adapters, self.checkpoint):
            part.mkdir(exist_ok=True)

    @staticmethod
    def refuse_taken(path: Path) -> None:
        """Nothing may be where a run folder is to be made.

        Raises:
            RunFolderError: something is.
        """
        with machine_errors():
            taken = path.exists() and (
                not path.is_dir() or any(child.name not in _BEGUN for child in path.iterdir())
            )
        if taken:
            raise RunFolderError(
                f"{path}: the run folder exists already and is never overwritten; choose "
                "another --output, or continue it with --resume"
            )

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """An existing run folder, whose config.toml is as it was written.

        Raises:
            RunFolderError: there is none, or config.toml is damaged.
            MachineError: it cannot be read.
        """
        with machine_errors():
            if not (path / _CONFIG).is_file():
                raise RunFolderError(f"{path}: {_other_than_a_run(path)}")
        folder = cls(path)
        if folder.recorded.hashes() is None and folder.second_run_json.is_file():
            raise RunFolderError(
                f"{path / RECORD}: the record of hashes is missing, so that nothing can be "
                "compared with it; put it back from a copy, or, where you trust the files as they "
                f"are: fedmira verify {path} --accept all"
            )
        folder.recorded.check(_CONFIG)
        return folder

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
        except OSError as error:
            raise MachineError(told(error, self.path)) from error
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

    @property
    def second_run_json(self) -> Path:
        """A second run.json, as it was when the run was last begun or resumed."""
        return self.checkpoint / "run.json"

    def append_events(self, events: Sequence[Mapping[str, object]]) -> None:
        """Add lines to events.jsonl."""
        self._append(
            "events.jsonl", "".join(json.dumps(event, allow_nan=False) + "\n" for event in events)
        )

    def append_round(self, row: Mapping[str, object]) -> None:
        """Add a line to metrics/rounds.csv, with a header where the file is new."""
        new = not self.rounds_csv.exists() or self.rounds_csv.stat().st_size == 0
        self.metrics.mkdir(exist_ok=True)
        self._append("metrics/rounds.csv", csv_text(list(row), [row], head=new))

    def _append(self, name: str, text: str) -> None:
        self.recorded.release(lambda known: known == name)
        self._grown[name].append(text.encode())

    def sizes(self) -> dict[str, int]:
        """Bytes of the growing files, for the checkpoint."""
        return {grown.path.name: grown.beginning()[0] for grown in self._grown.values()}

    def beginnings(self) -> dict[str, tuple[int, str]]:
        """Name of each growing file -> its bytes so far and their SHA-256, for the checkpoint."""
        return {name: grown.beginning() for name, grown in self._grown.items()}

    def lost_lines(self, beginnings: Mapping[str, tuple[int, str]]) -> list[str]:
        """What growing files no longer hold as a checkpoint says it; nothing where all is there.

        Args:
            beginnings: as `beginnings` gave them.
        """
        return [
            problem
            for name, (size, sha256) in beginnings.items()
            if (problem := GrowingFile(self.path / name).problem(size, sha256))
        ]

    def cut_back(self, sizes: Mapping[str, int]) -> None:
        """Drop lines that were written after a checkpoint, by a round that will be run again.

        Raises:
            RunFolderError: a file is shorter than it was then.
        """
        self.recorded.release(lambda name: name in _GROWING or name.startswith(_OF_RESULTS))
        for grown in self._grown.values():
            grown.cut_back(sizes.get(grown.path.name, 0))

    def seal(self) -> None:
        """Record every file of the results as it lies there; after it, nothing is written."""
        names = [name for name in _GROWING if (self.path / name).is_file()]
        for part in (self.metrics, self.adapters):
            names += [
                path.relative_to(self.path).as_posix()
                for path in sorted(part.rglob("*"))
                if path.is_file() and path.suffix != PARTIAL
            ]
        self.recorded.seal(dict.fromkeys(names))

    def write_table(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Replace metrics/`name` with a CSV of `rows`, which share their keys.

        Args:
            name: of the file.
            rows: column -> cell, in the order of the lines.
        """
        self.write_text(f"metrics/{name}", csv_text(list(rows[0]), rows))

    def write_text(self, name: str, text: str) -> None:
        """Replace `name` (relative to the folder).

        Args:
            name: of the file.
            text: its content.
        """
        (self.path / name).parent.mkdir(exist_ok=True)
        self.recorded.write(name, text)

    def write_json(self, name: str, value: object) -> None:
        """Replace `name` (relative to the folder) with a JSON document.

        Args:
            name: of the file.
            value: of JSON's types.
        """
        self.write_text(name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, object]:
        """A JSON document of the folder, or an empty one where it was never written.

        Args:
            name: of the file, relative to the folder.

        Raises:
            RunFolderError: it is damaged.
            MachineError: it cannot be read.
        """
        if not self.recorded.exists(name):
            return {}
        path = self.path / name
        try:
            value = json.loads(self.recorded.read(name).decode())
        except (ValueError, RecursionError) as error:
            raise RunFolderError(
                f"{path}: not valid JSON ({error}); restore the file or run again"
            ) from error
        if not isinstance(value, dict):
            raise RunFolderError(
                f"{path}: holds a {type(value).__name__}; must hold one JSON object; restore the "
                "file or run again"
            )
        return value

    def check_adapter(self, client: str) -> None:
        """Compare the files of a saved adapter with their record, where they have one.

        Args:
            client: its id.

        Raises:
            RunFolderError: one is damaged or gone.
        """
        known, start = self.recorded.hashes(), f"adapters/{client}/"
        for name in known.files if known else ():
            if name.startswith(start):
                self._saved.check(name)

    def damaged_results(self) -> list[str]:
        """What is wrong with files of the results that are in the record, a sentence each."""
        problems: list[str] = []
        known = self.recorded.hashes()
        for name in known.files if known else ():
            if name.startswith(_OF_RESULTS) or name == "graph.json":
                try:
                    self._saved.check(name)
                except RunFolderError as error:
                    problems += error.problems
        return problems

    def run_json(self) -> dict[str, Any]:
        """run.json; where it is damaged or gone, what it said when the run was last begun.

        Raises:
            RunFolderError: there is a checkpoint, but neither of the two.
            MachineError: it cannot be read.
        """
        try:
            found = self.read_json("run.json")
        except RunFolderError as error:
            second = self.read_json("checkpoint/run.json")
            if not second:
                raise
            _log.warning("%s", error)
            _log.warning("using %s, of the time when the run was last begun", self.second_run_json)
            return second
        if not found and (found := self.read_json("checkpoint/run.json")):
            _log.warning("%s is missing; using %s", self.path / "run.json", self.second_run_json)
        if not found and any(self.checkpoint.glob("round-*")):
            raise RunFolderError(
                f"{self.path / 'run.json'}: the file is missing, so that base, rows and versions "
                "of the run cannot be compared; put it back from a copy, or start a new run"
            )
        return found


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
