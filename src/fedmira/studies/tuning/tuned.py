"""Tuned settings in a comparison: read from the folders of searches, and held against its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmira.config import Config, flattened, load_config, with_algorithm, with_settings
from fedmira.errors import ConfigError, RunFolderError
from fedmira.records import RecordedFolder

__all__ = ["Tuned", "read_tuned"]

_OF_THE_SEARCH = ("adapter", "algorithm", "data", "graph", "local", "model", "rounds")
"""Sections in which a comparison must be as the search was, but for what was tuned."""
_FREE = ("data.clock",)
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a search found for a method.

    Attributes:
        folder: of the search.
        config: best.toml.
        document: tune.json.
    """

    folder: Path
    config: Config
    document: Mapping[str, Any]

    @property
    def values(self) -> dict[str, Any]:
        """The chosen values by dotted key."""
        return dict(self.document["best"]["values"])

    @property
    def seeds(self) -> list[int]:
        """Those that the settings were chosen by."""
        return [int(seed) for seed in self.document["seeds"]]

    @property
    def about(self) -> dict[str, Any]:
        """What the page of a comparison says of it."""
        document = self.document
        return {
            "values": self.values,
            "search": document["search"],
            "trials": len(document["trials"]),
            "seeds": self.seeds,
            "at": document["at"],
            "validation_loss": document["best"]["loss"],
            "edges": list(document["edges"]),
            "folder": str(self.folder),
        }

    def plan(self, config: Config, name: str) -> Config:
        """The method with its tuned settings in a comparison.

        Args:
            config: of the comparison.
            name: of the method.

        Raises:
            ConfigError: other settings than the tuned ones differ from those of the search.
        """
        plan = with_settings(with_algorithm(config, name), self.values)
        here, there = flattened(plan), flattened(self.config)
        differing = [
            f"{key} is {here.get(key)!r} here and was {there.get(key)!r}"
            for key in dict.fromkeys([*here, *there])
            if key.partition(".")[0] in _OF_THE_SEARCH
            and key not in _FREE
            and here.get(key) != there.get(key)
        ]
        if differing:
            more = f" and {len(differing) - _MOST_NAMED} more" if differing[_MOST_NAMED:] else ""
            raise ConfigError(
                f"{self.folder / 'best.toml'} was tuned with other settings than this comparison "
                f"has: {'; '.join(differing[:_MOST_NAMED])}{more}; give the config that was tuned, "
                "or tune again with this one"
            )
        return plan


def read_tuned(folder: Path, algorithms: Sequence[str], seeds: Sequence[int]) -> dict[str, Tuned]:
    """What was found for each method.

    Args:
        folder: with a folder for each method, as `fedmira tune --algorithms` makes it; or that of
            one search, where one method is compared.
        algorithms: names of methods.
        seeds: of the comparison, which may not be among those tuned on.

    Raises:
        RunFolderError: there is no finished search for a method.
        ConfigError: a seed was tuned on.
    """
    found: dict[str, Tuned] = {}
    problems: list[str] = []
    for name in algorithms:
        try:
            found[name] = _read(folder, name)
        except RunFolderError as error:
            problems += error.problems
    if problems:
        raise RunFolderError(problems)
    used = {seed: [name for name, tuned in found.items() if seed in tuned.seeds] for seed in seeds}
    taken = {seed: names for seed, names in used.items() if names}
    if taken:
        told = "; ".join(f"seed {seed} ({', '.join(names)})" for seed, names in taken.items())
        highest = max(seed for tuned in found.values() for seed in tuned.seeds)
        free = ",".join(str(highest + 1 + place) for place in range(len(seeds)))
        raise ConfigError(
            f"compare: settings were chosen by runs with {told}, and would look better there than "
            f"they are; compare with other --seeds, such as {free}"
        )
    return found


def _read(folder: Path, name: str) -> Tuned:
    """The search of one method.

    Raises:
        RunFolderError: it is not there, not finished, or of another method.
    """
    place = folder / name
    if not (place / "tune.json").is_file() and (folder / "tune.json").is_file():
        place = folder
    path = place / "tune.json"
    if not path.is_file():
        raise RunFolderError(
            f"{folder}: holds no tuned settings of {name} ({folder / name / 'tune.json'} is "
            f"missing); make them with fedmira tune --algorithms {name} --output {folder}, or give "
            "the method with --variant, which is not tuned"
        )
    try:
        document: dict[str, Any] = json.loads(RecordedFolder(place).read("tune.json").decode())
    except ValueError as error:
        raise RunFolderError(f"{path}: not valid JSON ({error}); tune again") from error
    if not document.get("complete"):
        raise RunFolderError(f"{path}: this search is not finished; go on with fedmira tune")
    if document.get("algorithm") != name:
        raise RunFolderError(
            f"{path}: tuned is {document.get('algorithm')!r}, and {name!r} is compared; tune "
            f"{name} with fedmira tune --algorithms {name}"
        )
    RecordedFolder(place).check("best.toml")
    return Tuned(place, load_config(place / "best.toml"), document)
