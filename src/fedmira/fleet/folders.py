"""A fleet: LoRA adapters of one base, from a run or from folders that anybody made."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedmira.adapters import padded
from fedmira.data import id_problem
from fedmira.errors import ConfigError, RunError, RunFolderError
from fedmira.model import LoraFolder, read_lora_folder
from fedmira.records import RecordedFolder, check_files
from fedmira.runs import RunFolder

__all__ = ["Fleet", "read_fleet", "rows_of_run"]

_CONFIG = "adapter_config.json"

_log = logging.getLogger("fedmira")


@dataclass(frozen=True)
class Fleet:
    """LoRA adapters of one base.

    Attributes:
        members: in the order in which they were given; a run's in the order of its index.
        run: the run folder that all are from, None where there is none.
        rows: training rows of those of which they are known.
        assumed: why the base is taken to be one and the same, "" where its hash says it.
    """

    members: tuple[LoraFolder, ...]
    run: Path | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    assumed: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """What the adapters are called."""
        return tuple(member.name for member in self.members)

    def only(self, names: Sequence[str]) -> Fleet:
        """Those of these names, in this order.

        Raises:
            ConfigError: one is not there, or none is named.
        """
        known = {member.name: member for member in self.members}
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            told = (
                f"there is no client {', '.join(map(repr, unknown))} here"
                if unknown
                else "no client is given"
            )
            raise ConfigError(f"{told}; there are {', '.join(self.names[:12])}")
        return replace(self, members=tuple(known[name] for name in names))


def read_fleet(places: Sequence[str | Path] | Mapping[str, str | Path], base: str = "") -> Fleet:
    """Read adapters, and make sure that they are of one base.

    Args:
        places: one run folder, or folders that plain PEFT loads, or folders of such folders; as a
            mapping, each under a name of its own.
        base: what the base of all of them is, where their own names of it differ.

    Raises:
        RunFolderError: something else is there, two have one name, or their bases differ; all
            problems of one kind together.
    """
    named = dict(places) if isinstance(places, Mapping) else {}
    paths = [Path(place) for place in (named.values() if named else places)]
    if len(paths) == 1 and (paths[0] / "config.toml").is_file():
        return _of_run(paths[0], base)
    found: list[tuple[Path, str]] = []
    for path, name in zip(paths, list(named) or [""] * len(paths), strict=True):
        found += [(path, name)] if name else [(each, "") for each in _within(path)]
    members: list[LoraFolder] = []
    problems: list[str] = []
    for path, name in found:
        try:
            check_files(path)
            members.append(read_lora_folder(path, name))
        except RunFolderError as error:
            problems += error.problems
    if not found:
        problems.append("no folder is given; give those of adapters, or that of a run")
    if problems:
        raise RunFolderError(problems)
    _check_names(members)
    return Fleet(tuple(members), assumed=_check_base(members, base))


def _of_run(path: Path, base: str) -> Fleet:
    index = _index(path / "adapters")
    if not index:
        raise RunFolderError(
            f"{path}: the run has saved no adapters yet; finish it with: fedmira run "
            f"--resume --output {path}"
        )
    if told := RunFolder.reopen(path).not_ended():
        _log.warning("%s", told)
    members = []
    for client in index:
        check_files(path / "adapters" / client)
        members.append(read_lora_folder(path / "adapters" / client, client))
    return Fleet(tuple(members), path, rows_of_run(path), _check_base(members, base))


def rows_of_run(path: Path) -> dict[str, int]:
    """Client -> its training rows, as far as the run's tables tell.

    Args:
        path: the run folder.
    """
    table = path / "metrics" / "clients.csv"
    if not table.is_file():
        return {}
    content = RunFolder(path).recorded.read("metrics/clients.csv").decode()
    lines = csv.DictReader(io.StringIO(content, newline=""))
    counts = {line["client"]: line["train_rows"] for line in lines}
    return {client: int(count) for client, count in counts.items() if count.isdigit()}


def _within(path: Path) -> list[Path]:
    """The adapter folder itself, or those in it.

    Raises:
        RunFolderError: it is a run beside other folders.
    """
    if (path / "config.toml").is_file():
        raise RunFolderError(
            f"{path}: a run stands alone; to put it together with others give {path / 'adapters'}"
        )
    if (path / _CONFIG).is_file() or not path.is_dir():
        return [path]
    inside = sorted(each.parent for each in path.glob(f"*/{_CONFIG}"))
    return inside or [path]


def _index(folder: Path) -> dict[str, Any]:
    """index.json of a run's adapters, empty where there is none.

    Raises:
        RunFolderError: it is damaged.
    """
    path = folder / "index.json"
    recorded = RecordedFolder(folder.parent)
    if not path.is_file():
        return {}
    try:
        found = json.loads(recorded.read(f"{folder.name}/index.json").decode())
    except ValueError as error:
        raise RunFolderError(f"{path}: not valid JSON ({error}); take it from a copy") from error
    return found if isinstance(found, dict) else {}


def _check_names(members: Sequence[LoraFolder]) -> None:
    """Names become folders.

    Raises:
        RunFolderError: one cannot, or two are alike.
    """
    problems, taken = [], dict[str, LoraFolder]()
    for member in members:
        if id_problem(member.name):
            problems.append(
                f"{member.path}: {member.name!r} cannot name a folder; give it as "
                f"NAME={member.path}"
            )
        other = taken.setdefault(member.name.casefold(), member)
        if other is not member:
            problems.append(
                f"{other.path} and {member.path} are both called {member.name!r}; give them as "
                "NAME=FOLDER"
            )
    if problems:
        raise RunFolderError(problems)


def _check_base(members: Sequence[LoraFolder], base: str) -> str:
    """Why the members are of one base; "" where its hash says it.

    Raises:
        RunFolderError: they are not, or it cannot be told.
    """
    try:
        padded([member.tensors for member in members])
    except RunError as error:
        raise RunFolderError(str(error).splitlines()) from error
    known = [_known_hash(member) for member in members]
    if all(known) and len(set(known)) == 1:
        return ""
    first = members[0]
    if all(known):
        other = next(i for i, each in enumerate(known) if each != known[0])
        raise RunFolderError(
            f"{first.name!r} was trained on a base with sha256 {known[0][:12]}, and "
            f"{members[other].name!r} on one with {known[other][:12]}; adapters of different "
            "bases cannot be put together"
        )
    if base:
        return f"they are taken to be of {base!r}, as was said"
    for member in members:
        if not member.base:
            raise RunFolderError(
                f"{member.path}: {_CONFIG} names no base; where all are of one, say which: --base"
            )
        if (member.base, member.revision) != (first.base, first.revision):
            raise RunFolderError(
                f"{first.name!r} is of {_told(first)}, and {member.name!r} of {_told(member)}; "
                "adapters of different bases cannot be put together. Where they are one base "
                "under two names, say so: --base NAME"
            )
    return f"all of them name {_told(first)} as their base; the weights were not compared"


def _told(member: LoraFolder) -> str:
    return repr(member.base) + (f" ({member.revision})" if member.revision else "")


def _known_hash(member: LoraFolder) -> str:
    """The hash of the base in the run's index beside the folder, "" where there is none."""
    about = _index(member.path.parent).get(member.path.name, {})
    return str(about.get("base_sha256", "")) if isinstance(about, dict) else ""
