"""docs/configuration.md lists every key with its default and its limits, and no other key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedmira.config import Config
from fedmira.config.methods import DEFAULT, method_class, method_names

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
ROW = re.compile(
    r"^\| `(?P<key>[a-z0-9_.]+)` \| (?P<default>[^|]+) \| (?P<allowed>[^|]+) \| "
    r"(?P<meaning>[^|]*) ?\|$"
)
NOT_SET = "not set"
PHRASES = {
    "minimum": "{:g} or more",
    "exclusiveMinimum": "above {:g}",
    "maximum": "{:g} or less",
    "exclusiveMaximum": "below {:g}",
}


def page_rows() -> dict[str, re.Match[str]]:
    rows = [
        found
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if (found := ROW.match(line))
    ]
    keys = [row["key"] for row in rows]
    assert len(set(keys)) == len(keys), "a key stands twice on the page"
    return dict(zip(keys, rows, strict=True))


def schema_keys() -> dict[str, Mapping[str, Any]]:
    """Dotted key -> its part of the JSON schema, which holds default and limits.

    Algorithms share the section [algorithm].
    """
    schema = Config.model_json_schema()
    definitions = schema["$defs"]
    keys: dict[str, Mapping[str, Any]] = {}
    for name, part in schema["properties"].items():
        section = Config.model_fields[name].default
        if name == "algorithm":
            for method in method_names():
                fields = method_class(method).model_json_schema()["properties"]
                keys |= {f"{name}.{key}": field for key, field in fields.items()}
            keys[f"{name}.name"] = {"default": DEFAULT, "enum": list(method_names())}
        elif "$ref" in part:
            keys |= {
                f"{name}.{key}": field
                for key, field in definitions[type(section).__name__]["properties"].items()
            }
        else:
            keys[name] = part
    return keys


def limits(field: Any) -> Iterator[str]:
    """What the page must say about the values of a key, in the words of the error messages."""
    if isinstance(field, list):
        for part in field:
            yield from limits(part)
    if not isinstance(field, Mapping):
        return
    yield from (phrase.format(field[name]) for name, phrase in PHRASES.items() if name in field)
    yield from (
        f'`"{choice}"`'
        for choice in [*field.get("enum", []), *([field["const"]] if "const" in field else [])]
    )
    if field.get("minLength") == 1:
        yield "not empty"
    for nested in ("anyOf", "items", "additionalProperties"):
        yield from limits(field.get(nested))


def test_the_page_lists_exactly_the_keys_of_the_schema() -> None:
    assert set(page_rows()) == set(schema_keys())


@pytest.mark.parametrize("key", schema_keys())
def test_the_page_gives_the_default_of_a_key(key: str) -> None:
    default = page_rows()[key]["default"]
    if default == NOT_SET:
        assert schema_keys()[key]["default"] is None
        return
    written = tomllib.loads(f"value = {default.strip('`')}")["value"]
    assert written == schema_keys()[key]["default"]
    assert type(written) is type(schema_keys()[key]["default"])


@pytest.mark.parametrize("key", schema_keys())
def test_the_page_gives_the_limits_of_a_key(key: str) -> None:
    missing = [
        phrase for phrase in limits(schema_keys()[key]) if phrase not in page_rows()[key]["allowed"]
    ]
    assert missing == []


def test_limits_are_read_from_unions_lists_and_tables() -> None:
    assert list(limits(schema_keys()["data.max_rows"])) == ["0 or more", "0 or more"]
    assert list(limits(schema_keys()["adapter.ranks"])) == ["1 or more"]
    assert list(limits(schema_keys()["engine.token_budget"])) == ["1 or more", '`"auto"`']
