"""What is done with adapters that exist already, from Python: merge, compress, align."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fedmira.errors import ConfigError
from fedmira.fleet import (
    AlignSettings,
    CompressedFleet,
    DecidedFleet,
    Fleet,
    Merged,
    OwnRows,
    align_fleet,
    compress_fleet,
    decide,
    merge_fleet,
    read_fleet,
)
from fedmira.records import check_new, machine_errors
from fedmira.studies.saved import clients_of, reload_adapters, trained_rows

__all__ = ["align", "compress", "merge"]

Places = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
"""One run folder, or folders that plain PEFT loads; as a mapping, each under a name of its own."""

_READING = ("data", "model", "engine")
"""Sections of a config that say how rows are read and measured."""

JUDGED_COUPLING = 1.0
"""How far adapters go by default where their owners' rows have the last word."""


@machine_errors()
def merge(
    adapters: Places,
    *,
    by: str = "metagpt",
    strength: float | Literal["auto"] = 1.0,
    rank: int | None = None,
    keep: float = 0.2,
    base: str = "",
    output: str | Path,
) -> Merged:
    """One adapter for everybody, made of those of a run or of folders.

    >>> import fedmira
    >>> merged = fedmira.merge("runs/first", by="rows", output="merged")
    >>> merged.clients
    ('east', 'north', 'south')

    Args:
        adapters: a run folder, or folders that plain PEFT loads.
        by: "metagpt" weighs updates by their squared norms, "rows" by training rows, "uniform" all
            alike; "ties" trims entries and takes the mean of those that agree in sign;
            "precision" weighs entries by how surely each client's training rows know them, which
            takes one pass over the rows of a run.
        strength: what the result is multiplied by; "auto" chooses 1, 2, 4 or 8 by the mean loss on
            the validation rows of a run.
        rank: of the result; the largest of all by default.
        keep: share of entries that "ties" keeps.
        base: what the base of all folders is, where their names of it differ.
        output: a new folder, which plain PEFT loads.

    Raises:
        InputError: an argument or a folder cannot be used.
    """
    check_new(_path("merge", "output", output))
    fleet = _read("merge", adapters, base)
    run = fleet.run
    rows = None if run is None else lambda: _validation_rows(run)
    trained = None if run is None else lambda: trained_rows(reload_adapters(run))
    made = merge_fleet(
        fleet, by, strength=strength, rank=rank, keep=keep, rows=rows, trained=trained
    )
    made.save(output)
    return made


@machine_errors()
def compress(
    adapters: Places,
    *,
    rank: int | None = None,
    energy: float | None = None,
    around: str | None = None,
    joined: bool = False,
    base: str = "",
    output: str | Path,
) -> CompressedFleet:
    """Adapters of fewer directions, each the nearest to what it was.

    >>> import fedmira
    >>> small = fedmira.compress("runs/first", rank=2, output="small")
    >>> [each.rank for each in small.members]
    [2, 2, 2]

    Args:
        adapters: as for `merge`.
        rank: the most directions that each layer keeps.
        energy: the share of each adapter's squared norm that is kept, by the smallest rank that
            does.
        around: "uniform" or "metagpt": one merged adapter for all, and of each the residual.
        joined: around a merged adapter, write each client's adapter in one piece too.
        base: as for `merge`.
        output: a new folder; adapters lie in it by name.

    Raises:
        InputError: an argument or a folder cannot be used.
    """
    check_new(_path("compress", "output", output))
    if joined and around is None:
        raise ConfigError(
            "compress: joined puts merged adapter and residual together; give around too"
        )
    made = compress_fleet(_read("compress", adapters, base), rank, energy, around)
    made.save(output, joined)
    return made


@machine_errors()
def align(
    adapters: Places,
    *,
    rows: str | Path | None = None,
    coupling: float | None = None,
    nearest: int = 3,
    base: str = "",
    settings: Mapping[str, Any] | Sequence[str] = (),
    output: str | Path,
) -> DecidedFleet:
    """Adapters that were trained apart, each moved towards those that learned something like it.

    >>> import fedmira
    >>> fleet = fedmira.align("runs/first", output="aligned")
    >>> sorted(fleet.figures)[:3]
    ['adapters', 'base', 'base_assumed']

    Args:
        adapters: as for `merge`, two or more.
        rows: a folder with a few validation rows of each owner, by the adapter's name, or the run
            folder itself for the validation rows of its clients; an owner takes the aligned adapter
            only where they show that it is better.
        coupling: most of the way to its neighbours' mean that an adapter goes; by default 0.5, and
            with rows 1.
        nearest: neighbours that each adapter chooses.
        base: as for `merge`; with rows, also where the base is loaded from.
        settings: how the rows of a folder are read: dotted key -> value for keys of [data], [model]
            and [engine], such as {"data.prompt": "chat"}, or "KEY=VALUE" each. Where the adapters
            are a run's, the form of its prompt and the length of its rows are taken from it.
        output: a new folder; adapters lie in it by name, beside graph.json and report.html.

    Raises:
        InputError: an argument or a folder cannot be used.
    """
    check_new(_path("align", "output", output))
    if rows is not None:
        _path("align", "rows", rows)
    if settings and rows is None:
        raise ConfigError(
            "align: settings say how rows are read; give rows too, or leave them away"
        )
    fleet = _read("align", adapters, base)
    usual = AlignSettings.coupling if rows is None else JUDGED_COUPLING
    chosen = AlignSettings(usual if coupling is None else coupling, nearest)
    made = decide(align_fleet(fleet, chosen), _judging(fleet, rows, base, settings))
    made.save(output)
    return made


def _judging(
    fleet: Fleet, rows: str | Path | None, base: str, settings: Mapping[str, Any] | Sequence[str]
) -> OwnRows | None:
    """The owners' rows, from a folder or from the run that the fleet is."""
    if rows is None:
        return None
    if fleet.run is not None and Path(rows).resolve() == fleet.run.resolve():
        if settings:
            raise ConfigError("align: a run's rows are read as its config.toml says; leave --set")
        return _validation_rows(fleet.run)
    if (Path(rows) / "config.toml").is_file():
        raise ConfigError(
            f"align: rows {str(rows)!r} is a run, and the adapters are given as folders or are "
            "those of another one; give the run itself as the adapters too, or a folder with rows "
            "of each owner"
        )
    _check_settings(settings)
    return OwnRows.of_folder(fleet, rows, base, settings)


def _check_settings(settings: Mapping[str, Any] | Sequence[str]) -> None:
    """Refuses settings that say nothing of how rows are read.

    Raises:
        ConfigError: there are such, or these are no settings.
    """
    if isinstance(settings, str) or not isinstance(settings, Mapping | Sequence):
        raise ConfigError(
            f"align: settings is {settings!r}; give a dict of dotted keys to values, such as "
            "{'data.prompt': 'chat'}"
        )
    keys = [str(each).partition("=")[0].strip() for each in settings]
    if other := [key for key in keys if key.partition(".")[0] not in _READING]:
        raise ConfigError(
            f"align: {', '.join(other)} would change nothing: settings say how rows are read, and "
            f"are keys of [{'], ['.join(_READING)}]"
        )


def _validation_rows(run: Path) -> OwnRows:
    """Those that the clients of a run set aside."""
    return OwnRows.of_clients(clients_of(reload_adapters(run), choosing=True))


def _read(verb: str, adapters: Places, base: str) -> Fleet:
    if isinstance(adapters, Mapping):
        places = {name: _path(verb, "adapters", place) for name, place in adapters.items()}
        return read_fleet(places, base)
    given = (
        [adapters] if isinstance(adapters, str) or not isinstance(adapters, Sequence) else adapters
    )
    return read_fleet([_path(verb, "adapters", place) for place in given], base)


def _path(verb: str, what: str, value: object) -> Path:
    """A path that was given from Python.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, str | Path):
        return Path(value)
    folder = getattr(value, "folder", None)
    hint = f", such as its folder {str(folder)!r}" if folder is not None else ""
    raise ConfigError(
        f"{verb}: {what} is of type {type(value).__name__}; give the path of a folder{hint}"
    )
