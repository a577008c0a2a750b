"""Arguments from Python that are of a wrong type, refused with the next step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from fedmira.config import MethodSection, method_names
from fedmira.errors import ConfigError, ModelError
from fedmira.model import BaseModel

__all__ = ["check_kinds", "check_method", "check_pair", "check_seeds"]


def check_kinds(method: object, clients: object, base: object, settings: object) -> None:
    """Refuses arguments of a wrong type.

    Args:
        method: as `fedmira.run` takes it.
        clients: as `fedmira.run` takes them.
        base: as `fedmira.run` takes it.
        settings: as `fedmira.run` takes them.

    Raises:
        InputError: naming the argument, and what it may be.
    """
    if method is not None:
        check_method(method)
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
    check_pair(base)


def check_pair(base: tuple[Any, ...]) -> None:
    """Refuses a pair that is not a model with its tokenizer.

    Args:
        base: what was given.

    Raises:
        ModelError: it is something else.
    """
    kinds = [type(each).__name__ for each in base]
    if len(base) != 2 or not (hasattr(base[0], "parameters") and hasattr(base[1], "eos_token_id")):
        raise ModelError(
            f"base is ({', '.join(kinds)}); give (model, tokenizer) of transformers, in this order"
        )


def check_method(method: object) -> None:
    """Refuses what is no method.

    Args:
        method: what was given.

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
        seeds: what was given.
        verb: of fedmira, for the error.

    Raises:
        ConfigError: it is no list of whole numbers from 0 on, or an empty one.
    """
    given = list(seeds) if isinstance(seeds, Iterable) else []
    if not given or not all(isinstance(seed, Integral) and int(seed) >= 0 for seed in given):
        raise ConfigError(
            f"{verb}: seeds is {seeds!r}; give at least one whole number, 0 or more, such as "
            "seeds=[0, 1, 2] or seeds=range(3)"
        )
