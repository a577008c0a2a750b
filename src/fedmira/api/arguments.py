"""What the verbs take from Python: settings, rows, bases and methods, as files or as objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from fedmira.config import (
    Config,
    MethodSection,
    load_config,
    method_names,
    with_method,
)
from fedmira.config.methods import AbsentMethod
from fedmira.data import ObjectRows, rows_from_objects
from fedmira.errors import ConfigError, ModelError
from fedmira.model import BaseModel, borrowed, from_model, with_padding

__all__ = ["Base", "Ready", "check_seeds", "kept_base", "prepared", "told_apart"]

Base = str | Path | BaseModel | tuple[Any, Any]
"""A name or folder of a base, one that is loaded already, or (model, tokenizer) of transformers."""

_OBJECT = "object"


def kept_base(verb: str, base: Base | None) -> BaseModel | None:
    """A base for a run that is there: the caller keeps the model, so it stays frozen.

    Args:
        verb: who asks, for the error.
        base: as it was given.

    Raises:
        ConfigError: it is a name or a folder.
    """
    if base is None or isinstance(base, BaseModel):
        return base
    if isinstance(base, tuple):
        _check_pair(base)
        return _base_of(*base)
    raise ConfigError(
        f"{verb}: base is {base!r}; give (model, tokenizer), as a folder's own base is "
        "loaded by itself"
    )


def _check_kinds(
    config: object, method: object, clients: object, base: object, settings: object
) -> None:
    """Refuses arguments of a wrong type.

    Raises:
        InputError: naming the argument, and what it may be.
    """
    if config is not None and not isinstance(config, Config | str | Path | Mapping):
        folder = getattr(config, "folder", None)
        hint = "" if folder is None else f"; its folder is {str(folder)!r}"
        raise ConfigError(
            f"config is of type {type(config).__name__}; give a Config, the path of a TOML file, "
            f"or a dict of dotted keys to values{hint}"
        )
    if method is not None:
        _check_method(method)
    if clients is not None and not isinstance(clients, str | Path | Mapping):
        raise ConfigError(
            f"clients is of type {type(clients).__name__}; give a dict of client ids to rows, such "
            "as {'north': rows}, or the path of a folder or a .jsonl file"
        )
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(
            f"settings is {settings!r}; give a dict of dotted keys to values, such as "
            "{'rounds.count': 20}"
        )
    if base is None or isinstance(base, str | Path | BaseModel):
        return
    if not isinstance(base, tuple):
        raise ModelError(
            f"base is of type {type(base).__name__}; give 'bundled', a folder, a hub id, or "
            "(model, tokenizer)"
        )
    _check_pair(base)


def _check_pair(base: tuple[Any, ...]) -> None:
    """Refuses a pair that is not a model with its tokenizer.

    Raises:
        ModelError: it is something else.
    """
    kinds = [type(each).__name__ for each in base]
    if len(base) != 2 or not (hasattr(base[0], "parameters") and hasattr(base[1], "eos_token_id")):
        raise ModelError(
            f"base is ({', '.join(kinds)}); give (model, tokenizer) of transformers, in this order"
        )


def _check_method(method: object) -> None:
    """Refuses what is no method.

    Raises:
        ConfigError: it is neither a name nor an object of a method.
    """
    if isinstance(method, str | MethodSection):
        return
    if isinstance(method, type) and issubclass(method, MethodSection):
        raise ConfigError(
            f"method {method.__name__} is a class; give an object of it: {method.__name__}()"
        )
    raise ConfigError(
        f"method {method!r}: give the name of one ({', '.join(method_names())}), or an object of "
        "a class that extends fedmira.Method"
    )


def check_seeds(seeds: object, verb: str = "compare") -> None:
    """Refuses seeds that are none.

    Args:
        seeds: as they were given.
        verb: who asks, for the error.

    Raises:
        ConfigError: it is no list of whole numbers from 0 on, or an empty one.
    """
    given = list(seeds) if isinstance(seeds, Iterable) else []
    if not given or not all(isinstance(seed, Integral) and int(seed) >= 0 for seed in given):
        raise ConfigError(
            f"{verb}: seeds is {seeds!r}; give at least one whole number, 0 or more, such as "
            "seeds=[0, 1, 2] or seeds=range(3)"
        )


@dataclass(frozen=True)
class Ready:
    """A checked config with the objects that it stands for.

    Attributes:
        config: of the run.
        base: one that was given as an object.
        rows: of clients that were given as objects.
    """

    config: Config
    base: BaseModel | None
    rows: ObjectRows | None


@contextmanager
def prepared(
    config: Config | str | Path | Mapping[str, Any] | None,
    method: str | MethodSection | None,
    clients: str | Path | Mapping[str, Any] | None,
    base: Base | None,
    settings: Mapping[str, Any] | None,
    preset: str | None,
) -> Iterator[Ready]:
    """The config and its objects; a model is frozen within the block only.

    Args:
        config: see `fedmira.run`, as for all that follow.
        method: a name or an object.
        clients: objects, or a path.
        base: a name, a folder, or an object.
        settings: win over the config.
        preset: lies under all others.

    Raises:
        InputError: something is of a wrong type, or does not go together.
    """
    _check_kinds(config, method, clients, base, settings)
    if isinstance(base, tuple):
        with borrowed(base[0]):
            own = _base_of(*base)
            yield _made(config, method, clients, own, settings, preset)
    else:
        yield _made(config, method, clients, base, settings, preset)


def _made(
    config: Config | str | Path | Mapping[str, Any] | None,
    method: str | MethodSection | None,
    clients: str | Path | Mapping[str, Any] | None,
    base: str | Path | BaseModel | None,
    settings: Mapping[str, Any] | None,
    preset: str | None,
) -> Ready:
    given = _written(config, preset)
    given |= settings or {}
    rows = rows_from_objects(clients) if isinstance(clients, Mapping) else None
    if rows is not None:
        given |= {"data.source": _OBJECT, "data.sha256": rows.sha256}
    elif clients is not None:
        given |= {"data.path": clients}
        given.setdefault("data.source", "jsonl")
    loaded = base if isinstance(base, BaseModel) else None
    if loaded is not None:
        given |= {"model.base": _OBJECT, "model.sha256": loaded.sha256}
    elif base is not None:
        given |= {"model.base": base}
    if isinstance(method, str):
        if method not in method_names():
            raise ConfigError(
                f"method {method!r}: there is none of this name; there are "
                f"{', '.join(method_names())}"
            )
        given |= {"algorithm.name": method}
    path = Path(config) if isinstance(config, str | Path) else None
    return Ready(_with(load_config(path, preset, (), given), method), loaded, rows)


def _written(
    config: Config | str | Path | Mapping[str, Any] | None, preset: str | None
) -> dict[str, Any]:
    """The settings of a config that is no file.

    Raises:
        ConfigError: a preset lies under a complete Config.
    """
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, Config):
        return {}
    if preset is not None:
        raise ConfigError(
            f"preset {preset!r} cannot lie under a Config, which is complete; give the "
            "settings that "
            "differ as a mapping instead"
        )
    return dict(config.model_dump(mode="json", exclude_unset=True, exclude_none=True))


def _with(config: Config, method: str | MethodSection | None) -> Config:
    """The config with a method object, where it is one.

    Raises:
        ConfigError: the config names an object that is not given, or another one.
    """
    if isinstance(method, MethodSection):
        return with_method(config, method)
    if isinstance(config.algorithm, AbsentMethod):
        raise ConfigError(config.algorithm.problem())
    return config


def _base_of(model: Any, tokenizer: Any) -> BaseModel:
    """A base of a transformers model and its tokenizer."""
    name = getattr(model, "name_or_path", "") or type(model).__name__
    return from_model(model, with_padding(tokenizer), name)


def told_apart(
    methods: Sequence[str | MethodSection] | Mapping[str, str | MethodSection],
) -> tuple[list[str], dict[str, MethodSection]]:
    """Names of methods, and objects by the name under which they run.

    Args:
        methods: as they were given.

    Raises:
        ConfigError: there are none, two go by one name, or something is neither.
    """
    if isinstance(methods, str) or not isinstance(methods, Mapping | Sequence) or not methods:
        raise ConfigError(
            f"compare: methods is {methods!r}; give a list of at least one, such as "
            "['local', 'mira'], or a dict of names to methods"
        )
    for each in methods.values() if isinstance(methods, Mapping) else methods:
        _check_method(each)
    pairs = (
        list(methods.items())
        if isinstance(methods, Mapping)
        else [
            (each if isinstance(each, str) else getattr(each, "name", ""), each) for each in methods
        ]
    )
    named: list[str] = []
    objects: dict[str, MethodSection] = {}
    for name, method in pairs:
        if isinstance(method, MethodSection) and name not in objects and name not in named:
            objects[name] = method
        elif isinstance(method, str) and method == name and name not in named:
            named.append(name)
        else:
            raise ConfigError(
                f"compare: {name!r} stands for {method!r}; give names of methods and "
                "method objects, two of one "
                "name as a dict: {'weak': Half(pull=0.1), 'strong': Half(pull=0.9)}"
            )
    return named, objects
