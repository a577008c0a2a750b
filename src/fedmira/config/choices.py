"""Settings that the choices of a run do not read, told by what their fields declare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from fedmira.config.methods import method_class, method_names
from fedmira.config.schema import Config
from fedmira.config.section import readers_of
from fedmira.config.sources import SOURCES

__all__ = ["Unread", "drop_unread", "needs_no_graph", "two_ways", "unread_keys", "written_out"]

Settings = Mapping[str, Any]

_SOMETIMES_LEFT_OUT = frozenset({"rank"})
"""Keys that config.toml does not hold where another one stands in their place."""


@dataclass(frozen=True, slots=True)
class Unread:
    """A key that a choice does not read.

    Attributes:
        section: of the config, such as "graph".
        key: within the section.
        value: what it was set to.
        chooser: the dotted key that decides, and `chosen`, its value.
        chosen: the value of `chooser`.
        readers: the choices that read it.
    """

    section: str
    key: str
    value: Any
    chooser: str
    chosen: str
    readers: tuple[str, ...]


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """The name and class of each section in which a choice can leave keys unread."""
    for name, field in Config.model_fields.items():
        of = field.annotation
        if (
            isinstance(of, type)
            and issubclass(of, BaseModel)
            and any(map(readers_of, of.model_fields.values()))
        ):
            yield name, of


_SECTIONS: Mapping[str, type[BaseModel]] = dict(_sections())


def drop_unread(section: str, below: dict[str, Any], above: Settings) -> None:
    """Removes from a lower layer's section what nothing reads beside a choice of an upper layer.

    Args:
        section: its name.
        below: its keys in the lower layer, which lose some.
        above: its keys in the upper layer.
    """
    if section not in _SECTIONS:
        return
    for key, field in _SECTIONS[section].model_fields.items():
        for chooser, readers in readers_of(field).items():
            chosen = above.get(chooser)
            if isinstance(chosen, str) and chosen not in readers and not _foreign(chooser, chosen):
                below.pop(key, None)


def unread_keys(settings: Settings, written: Settings) -> Iterator[Unread]:
    """Keys whose value is not the default and is not read.

    Args:
        settings: all layers joined, which say what is chosen.
        written: what to look through.
    """
    graphless = needs_no_graph(settings)
    for section, of in _SECTIONS.items():
        keys, joined = written.get(section), settings.get(section)
        if not isinstance(keys, Mapping) or not isinstance(joined, Mapping):
            continue
        for key, field in of.model_fields.items():
            if key not in keys or keys[key] == field.default:
                continue
            if section == "graph" and graphless:
                yield _without_graph(key, keys[key], settings)
                continue
            for chooser, readers in readers_of(field).items():
                chosen = joined.get(chooser, of.model_fields[chooser].default)
                if (
                    isinstance(chosen, str)
                    and chosen not in readers
                    and not _foreign(chooser, chosen)
                ):
                    place = f"{section}.{chooser}"
                    yield Unread(section, key, keys[key], place, chosen, readers)
                    break


def needs_no_graph(settings: Settings) -> bool:
    """Whether the settings name a method that does not look at the graph of clients."""
    chosen = settings.get("algorithm")
    name = chosen.get("name") if isinstance(chosen, Mapping) else None
    return (
        isinstance(chosen, Mapping)
        and "method" not in chosen
        and name in method_names()
        and not method_class(str(name)).uses_graph
    )


def _foreign(chooser: str, chosen: str) -> bool:
    """Whether the choice is a source of another package, which may read whatever it likes."""
    return chooser == "source" and chosen not in SOURCES


def _without_graph(key: str, value: Any, settings: Settings) -> Unread:
    """A key of [graph] under a method that uses no graph."""
    readers = tuple(name for name in method_names() if method_class(name).uses_graph)
    return Unread("graph", key, value, "algorithm.name", settings["algorithm"]["name"], readers)


def two_ways(written: Settings) -> tuple[Any, Any] | None:
    """`local.steps` and `local.epochs` where both are written and one rules out the other.

    The second, where it is above 0, makes the first have no effect.
    """
    local = written.get("local")
    if not isinstance(local, Mapping) or not {"steps", "epochs"} <= set(local):
        return None
    epochs = local["epochs"]
    return (local["steps"], epochs) if isinstance(epochs, int | float) and epochs > 0 else None


def written_out(section: str, keys: object) -> bool:
    """Whether a section is there in full, so that nobody chose its single keys.

    A run folder's config.toml has it so, defaults and all.

    Args:
        section: of the config.
        keys: those that were set in it.
    """
    if section not in _SECTIONS or not isinstance(keys, Mapping):
        return False
    always = {
        key
        for key, field in _SECTIONS[section].model_fields.items()
        if field.default is not None and key not in _SOMETIMES_LEFT_OUT
    }
    return always <= set(keys)
