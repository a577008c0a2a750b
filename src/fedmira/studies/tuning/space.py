"""The space of settings that a search looks through: read, checked, drawn from, and its edges."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fedmira.config import Config, with_settings
from fedmira.errors import ConfigError
from fedmira.seeds import seed_for

__all__ = [
    "Searched",
    "Space",
    "default_space",
    "draw",
    "edge_notes",
    "foreign_keys",
    "read_space",
    "value_of",
]

_SEARCHABLE = ("adapter", "algorithm", "graph", "local")
_REASONS = {
    "seed": "a seed is a repetition and no setting: give the seeds of each trial with --seeds",
    "data": "all trials must stand on the same rows: losses on others do not compare, and a split "
    "that is chosen would choose the test rows",
    "model": "losses under two bases do not compare: tune each base for itself",
    "rounds": "rounds are the budget that all trials share: set it in the config",
    "evaluation": "it says what is measured, and would move the yardstick",
    "engine": "it is about machines, and not about what is learned",
    "federation": "it is about machines, and not about what is learned",
}
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_RANGE_KEYS = {"low", "high", "log"}
_EDGE_SHARE = 0.1
"""A value in this outer part of a range lies on its edge."""
_MOST_TRIES = 1000


@dataclass(frozen=True, slots=True)
class Searched:
    """A setting that is searched: a list of values, or a range.

    Attributes:
        key: dotted, such as "local.learning_rate".
        values: of the list, numbers in their order; empty for a range.
        low: the least value of a range.
        high: the largest.
        log: whether factors count in the range, and not differences.
        whole: whether the range holds whole numbers only.
    """

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    @property
    def written(self) -> Any:
        """The setting as a space file has it."""
        if self.values:
            return list(self.values)
        return {"low": self.low, "high": self.high, "log": self.log}

    @property
    def probes(self) -> tuple[Any, ...]:
        """All values of a list, and both ends of a range."""
        return self.values or (self.low, self.high)

    @property
    def ordered(self) -> bool:
        """Whether its values are numbers, so that there are a least and a largest."""
        return all(_is_number(value) for value in self.probes)

    def holds(self, value: Any) -> bool:
        """Whether this is one of the values."""
        if self.values:
            return value in self.values
        return _is_number(value) and self.low <= value <= self.high

    def at(self, share: float) -> Any:
        """The value at a share of the way, from 0 to below 1; all values are equally likely."""
        if self.values:
            return self.values[int(share * len(self.values))]
        low, high = float(self.low), float(self.high)
        if self.whole:  # from half below the least to half above the largest
            low, high = low - 0.5, high + 0.5
        value = (
            math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
            if self.log
            else low + share * (high - low)
        )
        if self.whole:
            return min(max(round(value), int(self.low)), int(self.high))
        return float(f"{value:.4g}") if self.low <= float(f"{value:.4g}") <= self.high else value

    def edge(self, value: Any) -> str:
        """Which edge of the space a value lies on: "least", "largest", or "" for none.

        Of a list its first and last number; of a range the outer tenth, on its own scale.
        """
        if not self.ordered or len(set(self.probes)) < 2:
            return ""
        if self.values:
            ends = min(self.values), max(self.values)
            return "least" if value == ends[0] else "largest" if value == ends[1] else ""
        scale = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        if share <= _EDGE_SHARE:
            return "least"
        return "largest" if share >= 1 - _EDGE_SHARE else ""


@dataclass(frozen=True, slots=True)
class Space:
    """What is searched.

    Attributes:
        settings: in the order of their keys.
        notes: what was left out of it or made up, a sentence each.
    """

    settings: tuple[Searched, ...]
    notes: tuple[str, ...] = ()

    @property
    def written(self) -> dict[str, Any]:
        """Key -> its values or range, as a space file has them."""
        return {each.key: each.written for each in self.settings}

    @property
    def points(self) -> int | None:
        """How many different settings it holds; None where a range makes them many."""
        if not all(each.values for each in self.settings):
            return None
        return math.prod(len(each.values) for each in self.settings)

    def present(self, config: Config) -> dict[str, Any] | None:
        """The config's own values, where they lie in the space."""
        own = {each.key: value_of(config, each.key) for each in self.settings}
        return own if all(each.holds(own[each.key]) for each in self.settings) else None


def read_space(
    space: Path | Mapping[str, Any], config: Config, foreign: Sequence[str] = ()
) -> Space:
    """The space of a file or a mapping, checked against the config that it is searched around.

    Args:
        space: a TOML file, or dotted key -> list of values or {"low", "high", "log"}; tables of
            keys are the same as dotted keys.
        config: whose other settings all trials share.
        foreign: keys to be left out, which this method does not read.

    Raises:
        ConfigError: with all problems together: no such file, unknown keys, keys that may not be
            searched, values that the config does not take.
    """
    name, written = _written(space)
    problems: list[str] = []
    found = []
    for key, value in sorted(_flat(written).items()):
        if key in foreign:
            continue
        each = _searched(key, value, config, name, problems)
        if each is not None:
            found.append(each)
    if not found and not problems:
        problems.append(
            f"{name}: names no setting to search; give at least one key with a list of values, "
            'such as "local.learning_rate" = [1e-3, 3e-3]'
        )
    if problems:
        raise ConfigError(problems)
    left_out = [key for key in foreign if key in _flat(written)]
    notes = (
        [f"{', '.join(left_out)} of the space: {config.algorithm.name} does not read it; left out"]
        if left_out
        else []
    )
    return Space(tuple(found), tuple(notes))


def foreign_keys(space: Path | Mapping[str, Any], config: Config) -> list[str]:
    """Keys of a space that are settings of other methods than the config's.

    Args:
        space: as for `read_space`.
        config: names the method.

    Raises:
        ConfigError: the file cannot be read.
    """
    method = config.algorithm
    return [
        key
        for key in _flat(_written(space)[1])
        if (key.startswith("graph.") and not method.uses_graph)
        or (
            key.startswith("algorithm.")
            and key != "algorithm.name"
            and key.split(".")[1] not in type(method).model_fields
        )
    ]


def default_space(config: Config) -> Space:
    """The learning rate times 1/4, 1/2, 1, 2 and 4, and the method's main settings.

    The latter are those of `MethodSection.searched`. The config's own values are in it.

    Args:
        config: what is searched around.
    """
    rate = config.local.learning_rate
    rates = tuple(float(f"{factor * rate:.12g}") for factor in _FACTORS)
    found = [Searched("local.learning_rate", rates)]
    for name, offered in config.algorithm.searched.items():
        key, own = f"algorithm.{name}", getattr(config.algorithm, name)
        values = tuple(dict.fromkeys([*offered, own]))
        if all(map(_is_number, values)):
            values = tuple(sorted(values))
        if own is not None and with_settings(config, {key: own}) == config:
            found.append(Searched(key, tuple(v for v in values if _fits(config, key, v))))
    told = "; ".join(f"{each.key} = {list(each.values)}" for each in found)
    return Space(tuple(found), (f"no space was given, so the usual one was searched: {told}",))


def draw(
    space: Space, count: int, seed: int, first: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Different settings of a space, at random and in the order in which they are tried.

    The draws are keyed, so that more of them begin with the same ones.

    Args:
        space: what is drawn from.
        count: how many; fewer come where the space holds fewer.
        seed: of the draws.
        first: settings that come first, or None.
    """
    wanted = count if space.points is None else min(count, space.points)
    generator = np.random.default_rng(seed_for(seed, "tune"))
    found = [dict(first)] if first is not None else []
    for point in islice(_points(space, generator), _MOST_TRIES * max(1, wanted)):
        if len(found) >= wanted:
            break
        if point not in found:
            found.append(point)
    return found[:wanted]


def _points(space: Space, generator: np.random.Generator) -> Iterator[dict[str, Any]]:
    while True:
        yield {each.key: each.at(float(generator.random())) for each in space.settings}


def edge_notes(space: Space, config: Config, best: Mapping[str, Any]) -> list[str]:
    """Where the best settings lie on the edge of the space, a sentence each.

    Args:
        space: what was searched.
        config: that it was searched around.
        best: key -> the chosen value.
    """
    notes = []
    for each in space.settings:
        value = best[each.key]
        side = each.edge(value)
        if not side:
            continue
        step = 1e-3 * abs(value) or 1e-3
        beyond: float = value - step if side == "least" else value + step
        if isinstance(value, int):
            beyond = value - 1 if side == "least" else value + 1
        if _fits(config, each.key, beyond):
            way = "lower" if side == "least" else "higher"
            notes.append(
                f"{each.key} = {value!r} lies on the edge of the space ({side} of "
                f"{each.written}): a better value may lie beyond; tune again with {way} values"
            )
        else:
            notes.append(
                f"{each.key} = {value!r} lies on the edge of the space, and at the limit of the "
                "setting: there is nothing beyond"
            )
    return notes


def value_of(config: Config, key: str) -> Any:
    """The config's own value of a dotted key, or None where there is none.

    Args:
        config: any.
        key: such as "local.steps".
    """
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else getattr(found, part, None)
    return list(found) if isinstance(found, tuple) else found


def _written(space: Path | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    if isinstance(space, Mapping):
        return "space", space
    try:
        return str(space), tomllib.loads(space.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{space}: there is no such space file; write one with lines such as "
            '"local.learning_rate" = [1e-3, 3e-3], or leave --space away for the usual space'
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{space}: cannot be read as TOML: {error}") from error


def _flat(written: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted key -> list or range; a table that is no range is a section."""
    flat: dict[str, Any] = {}
    for name, value in written.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping) and not (_RANGE_KEYS & set(value)):
            flat |= _flat(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def _searched(
    key: str, value: Any, config: Config, name: str, problems: list[str]
) -> Searched | None:
    """A key of the space, or None with what is wrong with it among the problems."""
    place, section = f"{name}: {key}", key.partition(".")[0]
    if section in _REASONS:
        problems.append(f"{place} may not be searched: {_REASONS[section]}")
        return None
    if key == "algorithm.name":
        problems.append(
            f"{place} may not be searched: methods have settings of their own; tune each with "
            "--algorithms, and compare them with fedmira compare --tuned"
        )
        return None
    if section not in _SEARCHABLE:
        problems.append(
            f"{place}: unknown key; searched are keys of [{'], ['.join(_SEARCHABLE)}], such as "
            "local.learning_rate"
        )
        return None
    found: Searched | str
    if isinstance(value, Mapping):
        found = _range(key, value, isinstance(value_of(config, key), int))
    elif isinstance(value, list | tuple) and len(value) > 0:
        found = _list(key, value)
    else:
        found = (
            f"is {value!r}; must be a list of at least one value, or a range such as "
            "{low = 1e-4, high = 1e-2, log = true}"
        )
    if isinstance(found, str):
        problems.append(f"{place} {found}")
        return None
    refused = [
        f"{name}: {problem}" for probe in found.probes for problem in _problems(config, key, probe)
    ]
    problems += refused
    return None if refused else found


def _list(key: str, value: Sequence[Any]) -> Searched | str:
    twice = [each for place, each in enumerate(value) if each in value[:place]]
    if twice:
        return f"names {twice[0]!r} twice; name each value once"
    return Searched(key, tuple(sorted(value)) if all(map(_is_number, value)) else tuple(value))


def _range(key: str, value: Mapping[str, Any], of_whole: bool) -> Searched | str:
    low, high, log = value.get("low"), value.get("high"), value.get("log", False)
    unknown = set(value) - _RANGE_KEYS
    if unknown or not (_is_number(low) and _is_number(high)) or not isinstance(log, bool):
        return (
            f"is {dict(value)!r}; a range has the numbers low and high, and perhaps log = true "
            "or false"
        )
    assert isinstance(low, int | float) and isinstance(high, int | float)
    if not low < high:
        return f"is a range from {low!r} to {high!r}; low must be below high"
    if log and low <= 0:
        return f"is a range from {low!r} with log = true; low must be above 0, or log = false"
    whole = of_whole and isinstance(low, int) and isinstance(high, int)
    return Searched(key, low=low, high=high, log=log, whole=whole)


def _fits(config: Config, key: str, value: Any) -> bool:
    return not _problems(config, key, value)


def _problems(config: Config, key: str, value: Any) -> Sequence[str]:
    """Why the config does not take a value; nothing where it does."""
    try:
        with_settings(config, {key: value})
    except ConfigError as error:
        return [problem.removesuffix(" (settings)") for problem in error.problems]
    return ()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
