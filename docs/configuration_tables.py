"""The tables of docs/configuration.md, made of the fields of the settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import tomli_w

from fedmira.config import Config
from fedmira.config.methods import DEFAULT, method_class, method_names
from fedmira.config.section import readers_of

__all__ = ["tables"]

_HEAD = "| key | default | allowed | meaning |\n|---|---|---|---|"
_PHRASES = {
    "minimum": "{:g} or more",
    "exclusiveMinimum": "above {:g}",
    "maximum": "{:g} or less",
    "exclusiveMaximum": "below {:g}",
}
_KINDS = {
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
    "string": "text",
}


def tables() -> dict[str, str]:
    """Section -> its table; "top" is that of the keys outside of sections."""
    schema = Config.model_json_schema()
    made: dict[str, str] = {}
    top: list[str] = []
    for name, part in schema["properties"].items():
        if name == "algorithm":
            made[name] = _table(_method_rows())
        elif "$ref" in part:
            of = Config.model_fields[name].annotation
            properties = schema["$defs"][part["$ref"].rpartition("/")[2]]["properties"]
            made[name] = _table(
                _row(f"{name}.{key}", properties[key], _meaning(name, field))
                for key, field in of.model_fields.items()  # type: ignore[union-attr]
            )
        else:
            top.append(_row(name, part, part["description"]))
    return {"top": _table(top), **made}


def _method_rows() -> Iterator[str]:
    """A row for the name, and one for each setting, with the methods that have it."""
    about = [f"`{name}`: {_sentence(method_class(name))}" for name in method_names()]
    yield _row("algorithm.name", {"default": DEFAULT, "enum": method_names()}, ". ".join(about))
    rows: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for name in method_names():
        for key, part in method_class(name).model_json_schema()["properties"].items():
            rows.setdefault(key, (part, []))[1].append(name)
    for key, (part, names) in rows.items():
        yield _row(f"algorithm.{key}", part, f"{', '.join(names)}: {part['description']}.")


def _sentence(of: type) -> str:
    """What a method is: the first line of its module, begun in small letters as after a colon."""
    first = (import_module(of.__module__).__doc__ or "").splitlines()[0].removesuffix(".")
    name, colon, rest = first.partition(": ")
    return rest if colon and name.isupper() else first


def _meaning(section: str, field: Any) -> str:
    """The help text, with the choices under which the setting is read."""
    conditions = [
        f"`{section}.{chooser}` is {_either(values)}"
        for chooser, values in readers_of(field).items()
    ]
    told = field.description
    return f"{told} Read where {' and '.join(conditions)}." if conditions else told


def _either(values: Sequence[str]) -> str:
    *most, last = (f'`"{value}"`' for value in values)
    return " or ".join(filter(None, (", ".join(most), last)))


def _table(rows: Any) -> str:
    return "\n".join([_HEAD, *rows])


def _row(key: str, part: Mapping[str, Any], meaning: str) -> str:
    default = part["default"]
    written = (
        "not set"
        if default is None
        else "`" + _toml(list(default) if isinstance(default, tuple) else default) + "`"
    )
    return f"| `{key}` | {written} | {_allowed(part)} | {meaning.replace('|', chr(92) + '|')} |"


def _toml(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + "}"
    text = tomli_w.dumps({"value": value}).removeprefix("value = ").strip()
    return (
        " ".join(line.strip() for line in text.splitlines()).replace("[ ", "[").replace(", ]", "]")
    )


def _allowed(part: Mapping[str, Any]) -> str:
    """The values that a key takes, in the words of the error messages."""
    if "anyOf" in part:
        return "; or ".join(_allowed(each) for each in part["anyOf"] if each.get("type") != "null")
    choices = part.get("enum") or ([part["const"]] if "const" in part else [])
    if choices:
        return ", ".join(f'`"{choice}"`' for choice in choices)
    if part.get("type") == "array":
        if "prefixItems" in part:
            inner = list(dict.fromkeys(map(_allowed, part["prefixItems"])))
            return f"list of {len(part['prefixItems'])}: each a {' or '.join(inner)}"
        return f"list, each a {_allowed(part['items'])}"
    if part.get("type") == "object":
        return f"table of client id = {_allowed(part['additionalProperties'])}"
    limits = [phrase.format(part[name]) for name, phrase in _PHRASES.items() if name in part]
    if "type" not in part:  # a section of its own
        return "a table of keys"
    words = _KINDS[str(part["type"])] + (", " + " and ".join(limits) if limits else "")
    return words + (", not empty" if part.get("minLength") == 1 else "")
