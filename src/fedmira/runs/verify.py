"""Whether a folder still holds what was written into it: every file against its hash."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from fedmira.adapters import Adapter, content_hash
from fedmira.atomic import PARTIAL, replace_file
from fedmira.errors import FedmiraError, RunFolderError
from fedmira.model import read_trained
from fedmira.records import (
    RECORD,
    Hashes,
    RecordedFolder,
    lost_lines,
    machine_errors,
)
from fedmira.runs.checkpoint import CheckpointFolder
from fedmira.runs.folder import RunFolder

__all__ = ["Verification", "accept_files", "verify_folder"]

_GROWING = ("events.jsonl", "metrics/rounds.csv")


@dataclass
class Verification:
    """What was found of the files of a folder; names are relative to it.

    Attributes:
        folder: that was checked.
        checked: files whose content is what was written.
        damaged: what is wrong, a sentence each.
        unchecked: file -> why nothing can be said of it.
    """

    folder: Path
    checked: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    unchecked: dict[str, str] = field(default_factory=dict)


def verify_folder(path: Path) -> Verification:
    """Compare every file of a folder with what is recorded of it.

    Of a run that is its record, the adapters against adapters/index.json, and both checkpoints with
    everything that they name. Of a folder of runs, such as a comparison or a search, all of that of
    each run. Nothing is changed.

    Args:
        path: of a run, or a folder that holds runs.

    Raises:
        RunFolderError: it is neither, or has no record.
        MachineError: something cannot be read.
    """
    with machine_errors():
        if not path.is_dir():
            raise RunFolderError(f"{path}: there is no such folder; give one that a verb wrote")
        runs = sorted(
            config.parent
            for config in path.rglob("config.toml")
            if not config.parent.name.endswith(PARTIAL)
        )
        if not runs and not (path / RECORD).is_file():
            raise RunFolderError(
                f"{path}: this is no folder that a verb wrote and holds no run (no config.toml, "
                f"no {RECORD}); give one that an earlier run printed"
            )
        found = Verification(path)
        for run in runs:
            _verify_run(run, found)
        if path not in runs:
            records = {record.parent for record in path.rglob(RECORD)}
            for place in sorted(records):
                if not any(run == place or run in place.parents for run in runs):
                    _verify_record(place, found)
            for file in _files(path):
                if not any(run in file.parents for run in runs):
                    _note(found, path, file.relative_to(path).as_posix())
        return found


def accept_files(path: Path, names: Sequence[str]) -> list[str]:
    """Record files as they are now, as somebody says that he changed them himself.

    Args:
        path: of the folder that has the record.
        names: of files, relative to the folder; "all" stands for all outside checkpoint/.

    Returns:
        The names of what was recorded anew.

    Raises:
        RunFolderError: there is no such file, it belongs to a checkpoint, or a process runs there.
    """
    recorded = RecordedFolder(path)
    is_run = (path / "config.toml").is_file()
    with machine_errors(), RunFolder(path).locked() if is_run else nullcontext():
        if list(names) == ["all"]:
            files = [file.relative_to(path).as_posix() for file in _files(path)]
            chosen = [name for name in files if not name.startswith("checkpoint/round-")]
            chosen = [name for name in chosen if not name.startswith("checkpoint/adapters/")]
            replace_file(path / RECORD, Hashes().text())
        else:
            chosen = list(names)
            for name in chosen:
                if not (path / name).is_file() or name.startswith("checkpoint/"):
                    raise RunFolderError(
                        f"{path / name}: there is no such file that could be accepted; give its "
                        "name relative to the folder; those of a checkpoint cannot be"
                    )
        recorded.seal(chosen)
    return chosen


def _verify_run(run: Path, found: Verification) -> None:
    """Everything that one run has written."""
    name = _prefix(run, found.folder)
    folder = RunFolder(run)
    _verify_record(run, found)
    if (run / RECORD).is_file() is False and folder.second_run_json.is_file():
        found.damaged.append(f"{run / RECORD}: the record of hashes is missing")
    found.damaged += [problem for problem in lost_lines(run) if problem not in found.damaged]
    _verify_adapters(folder, found)
    checkpoints = CheckpointFolder(folder.checkpoint)
    needed: set[str] = set()
    for number, place in sorted(checkpoints.rounds().items()):
        problems = checkpoints.problems_of(number)
        found.damaged += [each for each in problems if each not in found.damaged]
        own = [f"{name}checkpoint/{place.name}/{file.name}" for file in sorted(place.iterdir())]
        if not (place / RECORD).is_file():
            found.unchecked |= {each: f"{place.name} has no {RECORD}" for each in own}
        elif not problems:
            found.checked += own
            needed |= checkpoints.keys_of(number)
    found.checked += [f"{name}checkpoint/adapters/{key}.safetensors" for key in sorted(needed)]
    beginnings = _beginnings(checkpoints)
    for file in _files(run):
        relative = file.relative_to(run).as_posix()
        _note(found, run, relative, beginnings.get(relative))


def _verify_record(folder: Path, found: Verification) -> None:
    """The files that a folder's own record lists."""
    recorded, name = RecordedFolder(folder), _prefix(folder, found.folder)
    try:
        known = recorded.hashes()
    except RunFolderError as error:
        found.damaged += error.problems
        return
    for each in known.files if known else ():
        try:
            recorded.check(each)
        except RunFolderError as error:
            found.damaged += error.problems
        else:
            found.checked.append(name + each)
    if known is not None:
        found.checked.append(name + RECORD)


def _verify_adapters(folder: RunFolder, found: Verification) -> None:
    """The content of each adapter against adapters/index.json."""
    try:
        index = folder.read_json("adapters/index.json")
    except RunFolderError:
        return  # the record has said so
    for client, entry in index.items():
        known = entry.get("sha256") if isinstance(entry, dict) else None
        try:
            adapter: Adapter = read_trained(folder.adapters / client)
        except RunFolderError as error:
            found.damaged += [each for each in error.problems if each not in found.damaged]
            continue
        if content_hash(adapter) != known:
            found.damaged.append(
                f"{folder.adapters / client}: the adapter's content has another SHA-256 than "
                "adapters/index.json says"
            )


def _beginnings(checkpoints: CheckpointFolder) -> Mapping[str, tuple[int, str]]:
    """What the newest checkpoint that can be read says of growing files."""
    for _, place in sorted(checkpoints.rounds().items(), reverse=True):
        try:
            known = RecordedFolder(place).hashes()
        except FedmiraError:
            continue
        return known.beginnings if known else {}
    return {}


def _note(
    found: Verification, folder: Path, name: str, beginning: tuple[int, str] | None = None
) -> None:
    """Say of a file that is in no record why nothing, or not all, can be said of it."""
    full = _prefix(folder, found.folder) + name
    if full in found.checked or any(
        problem.startswith(f"{folder / name}") for problem in (found.damaged)
    ):
        return
    if name.endswith(PARTIAL) or PARTIAL + "/" in name:
        found.unchecked[full] = "left half written by a process that was ended; a resume removes it"
    elif beginning is not None:
        found.unchecked[full] = f"checked up to byte {beginning[0]}; what follows is in no record"
    elif Path(name).name == ".lock":
        return
    else:
        found.unchecked[full] = "its hash was not recorded"


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())


def _prefix(folder: Path, above: Path) -> str:
    """What stands in front of names within `folder`, seen from the folder above."""
    inside = folder.relative_to(above).as_posix()
    return "" if inside == "." else f"{inside}/"
