"""What several runs of one study stand on: the base, and the rows of each seed."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from fedmira.config import Config, ModelSettings, dump_config
from fedmira.data import Dataset, ObjectRows, ReadRows, load_clients
from fedmira.errors import ConfigError, InputError, RunFolderError
from fedmira.experiment import make_scheme, prepare_kind, with_clock
from fedmira.model import BaseModel, load_base, load_tokenizer
from fedmira.runs import RunFolder, hash_of_rows

__all__ = ["CommonGround", "PlannedRun", "with_one_clock"]


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run of a study.

    Attributes:
        method: what it is called where something is wrong with it: a method, or a trial.
        folder: of the run.
        config: with its seed.
    """

    method: str
    folder: Path
    config: Config

    @property
    def is_begun(self) -> bool:
        """Whether there is something to continue."""
        return (self.folder / "config.toml").is_file()

    def is_finished(self) -> bool:
        """Whether the run is there and done.

        Raises:
            RunFolderError: it was made with other settings, or its folder holds something else.
        """
        if not self.is_begun:
            RunFolder.refuse_taken(self.folder)
            return False
        folder = RunFolder.reopen(self.folder)
        if folder.recorded.read("config.toml").decode() != dump_config(self.config):
            raise RunFolderError(
                f"{self.folder}: this run was made with other settings; choose another --output"
            )
        return folder.run_json().get("status") == "finished"


def with_one_clock(config: Config, output: Path, base: BaseModel | None, runs: str = "*") -> Config:
    """The config with the time that the chat template is told in all runs of a study.

    Args:
        config: of the study.
        output: its folder.
        base: one that is loaded already.
        runs: where run folders lie in it, as a pattern.
    """
    if config.data.prompt != "chat" or config.data.clock:
        return config
    for path in sorted(output.glob(f"{runs}/config.toml")):  # one that was begun says what it is
        clock = tomllib.loads(path.read_text(encoding="utf-8")).get("data", {}).get("clock", "")
        return config.model_copy(update={"data": config.data.model_copy(update={"clock": clock})})
    return with_clock(config, base.tokenizer if base else load_tokenizer(config.model))


class CommonGround:
    """What all runs of a study stand on: the base, and the rows of a seed.

    Those that were asked for last are in memory. The base is loaded once its first rows are read.

    Args:
        model: the [model] section.
        folders: method -> seed -> folder, of all runs, finished or not.
        base: one that is loaded already.
        given: rows of objects, or rows of a seed that are read already.
        tested: False sets the test rows aside, so that no run can be measured on them.
        kept: how many seeds' rows stay in memory.
    """

    def __init__(
        self,
        model: ModelSettings,
        folders: Mapping[str, Mapping[int, Path]],
        base: BaseModel | None = None,
        given: ObjectRows | ReadRows | None = None,
        *,
        tested: bool = True,
        kept: int = 1,
    ) -> None:
        self._model = model
        self._tokenizer = base.tokenizer if base else load_tokenizer(model)
        self._base = base
        self._given = given
        self._folders = folders
        self._tested, self._kept = tested, kept
        self._rows: dict[int, Dataset] = {}

    @property
    def base(self) -> BaseModel:
        """The base of all runs."""
        if self._base is None:
            self._base = load_base(self._model, self._tokenizer)
        return self._base

    def dataset(self, config: Config) -> Dataset:
        """The rows with this config's seed.

        Raises:
            DataError: they cannot be read.
            RunFolderError: a run with this seed stands on other rows, or on another base.
        """
        if config.seed not in self._rows:
            for old in list(self._rows)[: len(self._rows) - self._kept + 1]:
                del self._rows[old]  # these go before others are read
            given = self._given
            if isinstance(given, ReadRows) and given.seed != config.seed:
                given = None
            dataset = load_clients(config.data, config.seed, self._tokenizer, given)
            if not self._tested:
                dataset = dataset.untested()
            present = {
                "data": hash_of_rows({client.client_id: client for client in dataset.clients}),
                "base": self.base.sha256,
            }
            _refuse_other_ground(present, [runs[config.seed] for runs in self._folders.values()])
            self._rows[config.seed] = dataset
        return self._rows[config.seed]

    def check(self, runs: Sequence[PlannedRun]) -> None:
        """Build those parts of each run that its settings can spoil; nothing is trained.

        Args:
            runs: those with one seed side by side.

        Raises:
            InputError: as `dataset`.
            ConfigError: the problems of all methods together.
        """
        found: dict[str, list[str]] = {}
        for _, of_seed in groupby(runs, key=lambda run: run.config.seed):
            several = list(of_seed)
            parties = {
                party.client_id: party for party in self.dataset(several[0].config).summaries()
            }
            for run in several:
                try:
                    make_scheme(run.config, prepare_kind(run.config, self.base), parties)
                except InputError as error:
                    for problem in error.problems:
                        found.setdefault(problem, []).append(run.method)
        if found:
            raise ConfigError(
                [
                    f"{', '.join(dict.fromkeys(methods))}: {problem}"
                    for problem, methods in found.items()
                ]
            )


def _refuse_other_ground(present: Mapping[str, str], folders: Sequence[Path]) -> None:
    """The runs of a seed that exist must stand on the rows and the base of those that follow.

    Args:
        present: SHA-256 of "data" and "base".

    Raises:
        RunFolderError: one does not.
    """
    for folder in folders:
        document: Mapping[str, Any] = RunFolder(folder).read_json("run.json")
        changed = [
            part
            for part, sha256 in present.items()
            if document.get(part, {}).get("sha256", sha256) != sha256
        ]
        if changed:
            raise RunFolderError(
                f"{folder}: the {' and the '.join(changed)} changed since this run, so "
                "that others would not be comparable with it; "
                "put back what it was made with, or choose another --output"
            )
