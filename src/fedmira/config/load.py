"""From a TOML file, a preset and overrides to one checked config, and back to TOML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, TypeAdapter, ValidationError

from fedmira.config.choices import needs_no_graph
from fedmira.config.layers import (
    Layer,
    Settings,
    cover,
    read_overrides,
    read_settings,
    read_toml,
)
from fedmira.config.methods import (
    DEFAULT,
    OBJECT,
    AbsentMethod,
    MethodSection,
    is_object,
    method_names,
)
from fedmira.config.presets import preset_path
from fedmira.config.problems import describe_ignored, describe_problems, method_of
from fedmira.config.schema import Config, DataSettings
from fedmira.config.section import Count
from fedmira.config.sections.run import FederationSettings
from fedmira.errors import ConfigError

__all__ = [
    "dump_config",
    "load_config",
    "load_data_settings",
    "with_algorithm",
    "with_method",
    "with_overrides",
    "with_settings",
]

_KEYS = set(Config.model_fields)
_SECTIONS: Mapping[str, type[BaseModel]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if name != "algorithm"
    and isinstance(field.annotation, type)
    and issubclass(field.annotation, BaseModel)
}
"""The sections whose class is known without a method."""
_ONLY_WHERE_SET = ("privacy", "server")
"""Sections that are written only where a setting differs from its default.

Runs from before they were there are resumed by the text of their config.toml, which must be the
same.
"""
_SEED: TypeAdapter[int] = TypeAdapter(Count)


def load_config(
    path: Path | None = None,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Config:
    """Read a config from a preset, a file and overrides.

    The file wins over the preset, overrides win over both, and defaults fill the rest.

    A layer that sets one key makes what contradicts it below disappear (see `layers.cover`): naming
    another algorithm drops the settings that only the previous one has. Contradictions within one
    layer are errors.

    >>> import fedmira
    >>> config = fedmira.load_config(overrides=["algorithm.name=fedavg", "rounds.count=2"])
    >>> config.algorithm.name, config.rounds.count
    ('fedavg', 2)

    Args:
        path: a TOML file.
        preset: the name of a preset that lies under the file.
        overrides: `key=value` each, with a dotted key; the value is read as TOML, and as plain text
            where that fails.
        settings: dotted key -> value, from Python; they win over all. None leaves a key as it is.

    Raises:
        ConfigError: with all problems together: unreadable sources, unknown keys, values out of
            their limits.
    """
    layers, problems = _layers(path, preset, overrides, settings or {})
    return _check(layers, problems)


def load_data_settings(
    path: Path | None = None, preset: str | None = None, overrides: Sequence[str] = ()
) -> tuple[DataSettings, int] | None:
    """[data] and the seed of the config that `load_config` will read, in a tenth of the time.

    It imports no method, and with it torch: rows can be read, and be refused, before that.

    Args:
        path: as for `load_config`.
        preset: as for `load_config`.
        overrides: as for `load_config`.

    Returns:
        None where something is wrong, which `load_config` tells.
    """
    try:
        layers, problems = _layers(path, preset, overrides, {})
        settings = _joined(layers)
        if problems or _method_name(settings) not in method_names() or set(settings) - _KEYS:
            return None
        read = {
            name: section.model_validate(settings.get(name, {}))
            for name, section in _SECTIONS.items()
        }
        data = read["data"]
        assert isinstance(data, DataSettings)
        return data, _SEED.validate_python(settings.get("seed", 0))
    except (ConfigError, ValidationError):
        return None


def _layers(
    path: Path | None, preset: str | None, overrides: Sequence[str], settings: Mapping[str, Any]
) -> tuple[list[Layer], list[str]]:
    """All layers, lowest first, and what is wrong with the values from outside files.

    Raises:
        ConfigError: a file cannot be read.
    """
    layers: list[Layer] = []
    problems: list[str] = []
    for source in (preset, path):
        try:
            if isinstance(source, Path):
                layers.append(read_toml(source, str(source)))
            elif source is not None:
                layers.append(read_toml(preset_path(source), f"preset {source}"))
        except ConfigError as error:
            problems.extend(error.problems)
    override_layer, override_problems = read_overrides(overrides)
    if problems:
        raise ConfigError([*problems, *override_problems])
    given, given_problems = read_settings(settings)
    return [*layers, override_layer, given], [*override_problems, *given_problems]


def with_algorithm(config: Config, name: str) -> Config:
    """The same run with another algorithm.

    It keeps those settings of the present algorithm that it has too.

    Args:
        config: stays as it is.
        name: of the method.

    Raises:
        ConfigError: there is no algorithm of that name.
    """
    present = config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    return _check([Layer("", present), Layer("algorithm", {"algorithm": {"name": name}})], [])


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """The same run with `key=value` overrides on top.

    Args:
        config: stays as it is.
        overrides: texts such as "rounds.count=20", the last of one key wins.

    Raises:
        ConfigError: with all problems together.
    """
    layer, problems = read_overrides(overrides)
    present = config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    return _check([Layer("", present), layer], problems)


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The same run with these values on top, which need not be texts.

    Args:
        config: stays as it is.
        settings: dotted key -> value; those of [algorithm] may be of a method that is an object.

    Raises:
        ConfigError: with all problems together.
    """
    layer, problems = read_settings(settings)
    present = config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    above = dict(layer.settings)
    method = config.algorithm
    if is_object(method) and not isinstance(method, AbsentMethod):
        own = above.pop("algorithm", {})
        if own:
            method = type(method)(**{**method.model_dump(exclude_unset=True), **own})
        present["algorithm"] = method
    return _check([Layer("", present), Layer(layer.source, above)], problems)


def with_method(config: Config, method: MethodSection) -> Config:
    """The same run with another method, given as an object.

    Args:
        config: any, also that of a run folder which names an object.
        method: its settings are checked against the rest of the config.

    Raises:
        ConfigError: the method and the rest of the config do not go together, or the config names
            another object than this one.
    """
    present = config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    if isinstance(config.algorithm, AbsentMethod):
        problem = config.algorithm.differs(method)
        if problem:
            raise ConfigError(problem)
    return _check([Layer("", {**present, "algorithm": method})], [])


def dump_config(config: Config) -> str:
    """The config as TOML with its defaults, but for `_ONLY_WHERE_SET` where nothing is set.

    `load_config` reads an equal config from it.
    """
    settings = config.model_dump(mode="json", exclude_none=True)
    for name in _ONLY_WHERE_SET:
        if settings[name] == _SECTIONS[name]().model_dump(mode="json", exclude_none=True):
            del settings[name]
    if not settings["engine"]["apart"]:
        del settings["engine"]["apart"]  # as with these sections
    for key in config.federation.only_where_set:
        if getattr(config.federation, key) == FederationSettings.model_fields[key].default:
            del settings["federation"][key]
    if "server_step" in settings["algorithm"]:
        settings["algorithm"].pop(
            "coupling", None
        )  # it has no effect then, and setting both is an error
    if settings["adapter"]["rank_distribution"] != "one":
        del settings["adapter"]["rank"]  # as with coupling
    return tomli_w.dumps(settings)


def _joined(layers: Sequence[Layer]) -> Settings:
    """The settings of all layers; the last one that sets a key wins."""
    settings: Settings = {}
    for layer in layers:
        settings = cover(settings, layer.settings)
    return settings


def _method_name(settings: Settings) -> object:
    """What [algorithm] names, be it a method or not."""
    section = settings.get("algorithm", {})
    return section.get("name", DEFAULT) if isinstance(section, dict) else section


def _check(layers: Sequence[Layer], problems: Sequence[str]) -> Config:
    settings = _joined(layers)
    section = settings.get("algorithm")
    if isinstance(section, dict) and section.get("method") != OBJECT:
        section.setdefault("name", DEFAULT)
    written: Settings = {}
    for layer in layers:
        if needs_no_graph(layer.settings):
            written.pop("graph", None)  # written below, for the method that was chosen there
        written = cover(written, layer.written)
    method, details = method_of(settings)
    checked = {name: value for name, value in settings.items() if name != "algorithm"}
    if method is not None:
        checked["algorithm"] = method
    config: Config | None = None
    try:
        config = Config.model_validate(checked)
    except ValidationError as error:
        # Without its method, what holds for the config as a whole cannot be told.
        details += [
            detail for detail in error.errors(include_url=False) if detail["loc"] or not details
        ]
    problems = [
        *problems,
        *describe_problems(details, settings, layers),
        *describe_ignored(settings, written, layers),
    ]
    if config is None or problems:
        raise ConfigError(problems)
    return config
