"""Settings that nothing reads beside what was chosen.

The key of a graph kind, an optimizer or an adapter kind under another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedmira.config.schema import AdapterSettings, GraphSettings, LocalSettings
from fedmira.config.section import Section

__all__ = ["Unread", "drop_unread", "two_ways", "unread_keys", "written_out"]

Settings = Mapping[str, Any]

_LEARNED = ("similarity", "pfedgraph")
_SOPHIA = ("sophia",)
_ZEROTH = ("zeroth-order",)

_SECTIONS: Mapping[str, type[Section]] = {
    "graph": GraphSettings,
    "local": LocalSettings,
    "adapter": AdapterSettings,
}
_CHOOSERS = {"graph": "kind", "local": "optimizer", "adapter": "kind"}
_READ_BY: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "graph": {
        "measure": _LEARNED,
        "nearest": ("similarity",),
        "memory": _LEARNED,
        "warmup_rounds": _LEARNED,
        "alpha": ("pfedgraph",),
    },
    "local": {
        "sophia_refresh": _SOPHIA,
        "sophia_gamma": _SOPHIA,
        "sophia_rho": _SOPHIA,
        "zeroth_seeds": _ZEROTH,
        "zeroth_width": _ZEROTH,
    },
    "adapter": {
        "virtual_tokens": ("p-tuning", "prompt", "prefix"),
        "encoder": ("p-tuning",),
        "encoder_hidden": ("p-tuning", "prefix"),
        "prefix_projection": ("prefix",),
    },
}
"""Section -> key -> the choices that read it."""


@dataclass(frozen=True, slots=True)
class Unread:
    """A key that the choice of its section does not read.

    Attributes:
        chooser: the key of the same section that decides, and `chosen`, its value.
        readers: the choices that read it.
    """

    section: str
    key: str
    value: Any
    chooser: str
    chosen: str
    readers: tuple[str, ...]


def drop_unread(section: str, below: dict[str, Any], above: Settings) -> None:
    """Remove from a lower layer's section what nothing reads beside the choice that an upper layer makes."""
    chosen = above.get(_CHOOSERS.get(section, ""))
    for key, readers in _READ_BY.get(section, {}).items():
        if isinstance(chosen, str) and chosen not in readers:
            below.pop(key, None)


def unread_keys(settings: Settings, written: Settings) -> Iterator[Unread]:
    """Keys whose value is not the default and is not read.

    Args:
        settings: all layers joined, which say what is chosen.
        written: what to look through.
    """
    for section, readers_of in _READ_BY.items():
        joined, keys, chooser, fields = (
            settings.get(section),
            written.get(section),
            _CHOOSERS[section],
            _SECTIONS[section].model_fields,
        )
        if not isinstance(joined, Mapping) or not isinstance(keys, Mapping):
            continue
        chosen = joined.get(chooser, fields[chooser].default)
        for key, readers in readers_of.items():
            if (
                isinstance(chosen, str)
                and key in keys
                and chosen not in readers
                and keys[key] != fields[key].default
            ):
                yield Unread(section, key, keys[key], chooser, chosen, readers)


def two_ways(written: Settings) -> tuple[Any, Any] | None:
    """`local.steps` and `local.epochs` where both are written and the second makes the first have no effect."""
    local = written.get("local")
    if not isinstance(local, Mapping) or not {"steps", "epochs"} <= set(local):
        return None
    epochs = local["epochs"]
    return (local["steps"], epochs) if isinstance(epochs, int | float) and epochs > 0 else None


def written_out(section: str, keys: object) -> bool:
    """Whether a section is there in full, defaults and all, as `config.toml` of a run folder has it: nobody chose its single keys."""
    if section not in _SECTIONS or not isinstance(keys, Mapping):
        return False
    return set(_SECTIONS[section].model_fields) - {"rank"} <= set(
        keys
    )  # rank is left out where ranks are drawn
