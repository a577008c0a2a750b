"""What is wrong with a config, in words.

The dotted key, the value, what is allowed, and the nearest key or value.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedmira.config.choices import two_ways, unread_keys
from fedmira.config.layers import (
    OVERRIDES,
    Layer,
    Settings,
)
from fedmira.config.methods import DEFAULT, OBJECT, method_class, method_names
from fedmira.config.other_names import OTHER_NAMES
from fedmira.config.schema import Config
from fedmira.errors import ConfigError

__all__ = ["describe_ignored", "describe_problems", "method_of", "refuse_federation"]

UNKNOWN_METHOD = "unknown_method"
"""The type of our own detail beside pydantic's."""

_Path = tuple[str | int, ...]

_LIMITS = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "below {lt:g}",
    "less_than_equal": "{le:g} or less",
}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text in quotes",
    "tuple": "a list in brackets",
    "dict": "a table of names and values",
}


def describe_problems(
    found: Sequence[ErrorDetails], settings: Settings, layers: Sequence[Layer]
) -> list[str]:
    """One message for each wrong key, values of another type in files included.

    Args:
        found: what pydantic found in `settings`.
        settings: the joined settings of all layers.
        layers: lowest first; the message names the highest one that sets the key.
    """
    details: dict[_Path, list[ErrorDetails]] = {}
    for detail in found:
        if detail["type"] == "default_factory_not_called":
            continue  # a default that depends on a wrong key is not wrong itself
        details.setdefault(_locate(detail["loc"], settings), []).append(detail)
    details = _mistyped(settings, layers) | details
    # A value that may be one of several types fails once for each; where an item inside it is
    # wrong, only the item counts.
    outermost = [
        path
        for path in details
        if any(other[: len(path)] == path for other in details if len(other) > len(path))
    ]
    return [
        _describe(path, each, settings, layers)
        for path, each in details.items()
        if path not in outermost or not path
    ]


def describe_ignored(settings: Settings, written: Settings, layers: Sequence[Layer]) -> list[str]:
    """One message for each setting that would have no effect.

    Args:
        settings: the joined settings of all layers.
        written: those that somebody chose to write.
        layers: as for `describe_problems`.
    """
    problems = []
    for unread in unread_keys(settings, written):
        place = unread.chooser
        readers = " or ".join(
            filter(None, (", ".join(map(repr, unread.readers[:-1])), repr(unread.readers[-1])))
        )
        problems.append(
            f"{unread.section}.{unread.key} = {_show(unread.value)}: {place} = "
            f"{unread.chosen!r} does not read it; leave it out, or set "
            f"{place} to {readers}{_origin((unread.section, unread.key), layers)}"
        )
    both = two_ways(written)
    if both is not None:
        steps, epochs = map(_show, both)
        problems.append(
            f"local.steps = {steps} and local.epochs = {epochs}: epochs above 0 count "
            "passes over the rows in place of steps; set one of "
            f"them{_origin(('local', 'steps'), layers)}"
        )
    return problems


def refuse_federation(*configs: Config) -> None:
    """Refuses keys of [federation] that somebody wrote for runs in one process.

    A section that is there in full is let through, as in a run folder's config.toml, where nobody
    chose its single keys.

    Raises:
        ConfigError: keys that differ from their defaults, all of them together.
    """
    problems = []
    for config in configs:
        section = config.federation
        fields = type(section).model_fields
        if set(fields) <= {*section.model_fields_set, *section.only_where_set}:
            continue
        problems += [
            f"federation.{key} = {_show(getattr(section, key))}: a run in one process does not "
            "read it; leave it out, or train over Flower (fedmira flower init, then flwr run)"
            for key in fields
            if key in section.model_fields_set and getattr(section, key) != fields[key].default
        ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _mistyped(settings: Settings, layers: Sequence[Layer]) -> dict[_Path, list[ErrorDetails]]:
    """Numbers and switches that a file writes as another type, which pydantic would read over."""
    details: dict[_Path, list[ErrorDetails]] = {}
    # As JSON, because a list stands for a tuple there even where types are strict.
    for section, checked in _strictly(settings):
        try:
            checked()
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                location = (*section, *detail["loc"])
                details.setdefault(_locate(location, settings), []).append(detail)
    return {
        path: each
        for path, each in details.items()
        if any(map(_is_other_type, each)) and _source(path, layers) not in ("", OVERRIDES)
    }


def _strictly(settings: Settings) -> Iterator[tuple[_Path, Callable[[], object]]]:
    """Where a part of the settings stands, and a strict check of it: the method's section apart."""
    rest = {name: value for name, value in settings.items() if name != "algorithm"}
    yield (), partial(Config.model_validate_json, json.dumps(rest, default=str), strict=True)
    section = settings.get("algorithm")
    if isinstance(section, Mapping) and section.get("name") in method_names():
        keys = {key: value for key, value in section.items() if key != "name"}
        of = method_class(section["name"])
        yield (
            ("algorithm",),
            partial(of.model_validate_json, json.dumps(keys, default=str), strict=True),
        )


def method_of(settings: Settings) -> tuple[Any, list[ErrorDetails]]:
    """The method that the settings choose, and what is wrong with its section.

    Returns:
        The method, None where something is wrong, or the section as it is where it is none; and
        pydantic's details, located in the settings.
    """
    section = settings.get("algorithm")
    if not isinstance(section, Mapping) or section.get("method") == OBJECT:
        return section, []
    if section["name"] not in method_names():
        at = ("algorithm", "name")
        return None, [ErrorDetails(type=UNKNOWN_METHOD, loc=at, msg="", input=section["name"])]
    keys = {key: value for key, value in section.items() if key != "name"}
    try:
        return method_class(section["name"]).model_validate(keys), []
    except ValidationError as error:
        found = error.errors(include_url=False)
        return None, [{**detail, "loc": ("algorithm", *detail["loc"])} for detail in found]


def _is_other_type(detail: ErrorDetails) -> bool:
    if detail["type"] == "bool_type":
        return isinstance(detail["input"], str | int)
    return detail["type"] in ("int_type", "float_type") and isinstance(detail["input"], str | bool)


def _locate(location: Sequence[str | int], settings: Settings) -> _Path:
    """The part of pydantic's location that is really in the settings.

    It also names union members, which are not.
    """
    path: list[str | int] = []
    value: Any = settings
    for name in location:
        is_item = isinstance(value, list) and isinstance(name, int) and name < len(value)
        if is_item or (isinstance(value, Mapping) and name in value):
            value = value[name]
            path.append(name)
    return tuple(path)


def _describe(
    path: _Path, details: Sequence[ErrorDetails], settings: Settings, layers: Sequence[Layer]
) -> str:
    first = details[0]
    if first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        return f"{_dotted(path)}: {reason}" if path else reason
    if first["type"] == UNKNOWN_METHOD:
        name = settings["algorithm"]["name"]
        choices = _choose(str(name), method_names())
        return (
            f"algorithm.name = {_show(name)}: unknown algorithm; {choices}{_origin(path, layers)}"
        )
    value = first["input"]
    if first["type"] == "extra_forbidden":
        known = _suggest_key(path, settings)
        return f"{_dotted(path)} = {_show(value)}: unknown key; {known}{_origin(path, layers)}"
    if first["type"].startswith("model_"):
        keys = ", ".join(_keys(path, settings))
        return (
            f"{_dotted(path)} = {_show(value)}: must be a section; write [{_dotted(path)}] with "
            f"any of: {keys}{_origin(path, layers)}"
        )
    allowed = " or ".join(dict.fromkeys(_allowed(detail) for detail in details))
    return f"{_dotted(path)} = {_show(value)}: must be {allowed}{_origin(path, layers)}"


def _allowed(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _LIMITS:
        return _LIMITS[kind].format(**context)
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        near = difflib.get_close_matches(str(detail["input"]), choices, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        return (f"one of {', '.join(choices)}" if len(choices) > 1 else repr(choices[0])) + hint
    if kind == "string_too_short":
        return "text that is not empty"
    return _KINDS.get(kind.partition("_")[0], detail["msg"].removeprefix("Input should be "))


def _choose(name: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, choices, n=1)
    return f"must be one of {', '.join(choices)}" + (f"; did you mean {near[0]!r}?" if near else "")


def _suggest_key(path: _Path, settings: Settings) -> str:
    """The nearest key of the same section, else of any section; and all keys of the section."""
    *section, key = (str(name) for name in path)
    siblings = _keys(tuple(section), settings)
    elsewhere = OTHER_NAMES.get(".".join([*section, key]).lower()) or OTHER_NAMES.get(key.lower())
    near = (
        [elsewhere]
        if elsewhere
        else [
            ".".join([*section, match]) for match in difflib.get_close_matches(key, siblings, n=1)
        ]
    )
    if not near:
        names = dict(_all_keys(settings))
        near = [names[match] for match in difflib.get_close_matches(key, names, n=1, cutoff=0.75)]
    owners = [
        name
        for name, fields in ((name, method_class(name)) for name in method_names())
        if section == ["algorithm"] and key in fields.model_fields
    ]
    hint = (
        f"it belongs to {' and '.join(owners)}; "
        if owners
        else f"did you mean {near[0]}? "
        if near
        else ""
    )
    place = (
        f"algorithm {settings['algorithm']['name']} knows"
        if section == ["algorithm"]
        else f"[{'.'.join(section)}] knows"
    )
    return f"{hint}{place if section else 'there are'}: {', '.join(siblings)}"


def _all_keys(settings: Settings) -> Iterator[tuple[str, str]]:
    """Every key with its dotted name; the algorithm's are those of the algorithm that was named."""
    for section in Config.model_fields:
        fields = _section_class((section,), settings).model_fields
        yield from (
            (key, f"{section}.{key}" if fields is not Config.model_fields else key)
            for key in fields
        )


def _keys(path: _Path, settings: Settings) -> list[str]:
    """The keys of the section at `path`; of the method's section, its name too."""
    fields = list(_section_class(path, settings).model_fields)
    return ["name", *fields] if path == ("algorithm",) else fields


def _section_class(path: _Path, settings: Settings) -> type[BaseModel]:
    """The class of the section at `path`; the whole config where there is none."""
    if not path:
        return Config
    if path[0] == "algorithm":
        chosen = settings.get("algorithm")
        name = chosen.get("name") if isinstance(chosen, Mapping) else None
        return method_class(str(name) if name in method_names() else DEFAULT)
    annotation = Config.model_fields[str(path[0])].annotation
    return (
        annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else Config
    )


def _origin(path: _Path, layers: Sequence[Layer]) -> str:
    source = _source(path, layers)
    return f" ({source})" if source else ""


def _source(path: _Path, layers: Sequence[Layer]) -> str:
    """The highest layer that sets a key; "" where none does."""
    return next(
        (layer.source for layer in reversed(layers) if _locate(path, layer.settings) == path), ""
    )


def _dotted(path: _Path) -> str:
    return ".".join(
        str(name) if re.fullmatch(r"[A-Za-z0-9_-]+", str(name)) else json.dumps(name)
        for name in path
    )


def _show(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
