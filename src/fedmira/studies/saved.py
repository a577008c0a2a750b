"""A finished run taken up again.

Its base, its saved adapters and, where they are on this machine, its rows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedmira.adapters import Adapter, LazyAdapters, content_hash
from fedmira.clients import CohortSettings, LocalClients, references_of
from fedmira.config import Config, load_config
from fedmira.data import ObjectRows, load_clients
from fedmira.errors import ConfigError, DataError, RunFolderError
from fedmira.experiment import prepare_kind, token_budget, where_they_lay
from fedmira.fleet import OwnRows
from fedmira.messages import ClientId
from fedmira.model import (
    AdapterKind,
    BaseModel,
    most_side_by_side,
    usual_token_budget,
)
from fedmira.records import RecordedFolder, check_files
from fedmira.runs import RunFolder, hash_of_rows

__all__ = [
    "SavedAdapters",
    "clients_of",
    "quick_budget",
    "refuse_unknown",
    "refuse_other",
    "reload_adapters",
    "shared_prompt",
    "trained_rows",
]

_DECISION = "decision.json"

_log = logging.getLogger("fedmira")


@dataclass(frozen=True)
class SavedAdapters:
    """What a run has saved, on its base; no rows are needed.

    Attributes:
        path: the run folder.
        config: of the run.
        kind: the adapters, on their base.
        adapters: each client's, read when it is asked for.
        ranks: of each adapter, 0 where it has none.
        data_sha256: of the rows that the run was made with.
        rows_elsewhere: whether nodes had the rows, so that the hash is of what they told.
        prompts: what the prompts of a client's training rows share, where it is known.
    """

    path: Path
    config: Config
    kind: AdapterKind
    adapters: Mapping[ClientId, Adapter]
    ranks: Mapping[ClientId, int]
    data_sha256: str
    rows_elsewhere: bool = False
    prompts: Mapping[ClientId, Mapping[str, Any]] = field(default_factory=dict)


def reload_adapters(path: Path, base: BaseModel | None = None) -> SavedAdapters:
    """Loads the base of a run, and finds its adapters.

    Args:
        path: the run folder, or that of decisions: the adapters are then those that clients took.
        base: of a run whose base was an object, or one that is loaded already.

    Raises:
        RunFolderError: it is no run folder, has no adapters, or the base model has changed since.
    """
    if (path / _DECISION).is_file() and not (path / "config.toml").is_file():
        return _decided(path, base)
    folder = RunFolder.reopen(path)
    index = folder.read_json("adapters/index.json")
    if not index:
        raise RunFolderError(
            f"{path}: the run has saved no adapters yet; finish it with: fedmira run "
            f"--resume --output {path}"
        )
    if told := folder.not_ended():
        _log.warning("%s", told)
    run: dict[str, Any] = folder.read_json("run.json")
    config = where_they_lay(load_config(path / "config.toml"), run)
    kind = prepare_kind(config, base)
    ranks = {}
    for client, entry in index.items():
        about = entry if isinstance(entry, dict) else {}
        trained_on, ranks[client] = about.get("base_sha256", ""), int(about.get("rank", 0))
        if trained_on != kind.base.sha256:
            raise RunFolderError(
                f"{path}: the adapter of {client!r} was trained on another base (sha256 "
                f"{trained_on[:12]}, {config.model.base!r} "
                f"has {kind.base.sha256[:12]}); give the base it was trained on"
            )
    rows = run.get("data", {})

    def read(client: ClientId) -> Adapter:
        folder.check_adapter(client)
        adapter = kind.read(folder.adapters / client)
        refuse_other(folder, client, index[client], adapter)
        return adapter

    adapters = LazyAdapters(index, read)
    return SavedAdapters(
        path=path,
        config=config,
        kind=kind,
        adapters=adapters,
        ranks=ranks,
        prompts={
            client: entry["prompt"]
            for client, entry in index.items()
            if isinstance(entry, dict) and isinstance(entry.get("prompt"), dict)
        },
        data_sha256=rows.get("sha256", ""),
        rows_elsewhere="federation" in run,
    )


def _decided(path: Path, base: BaseModel | None) -> SavedAdapters:
    """What clients took, each from the run that made it or, of two runs, from the decisions.

    Raises:
        RunFolderError: a run is gone, or adapters of two runs are not of one kind.
    """
    try:
        document: dict[str, Any] = json.loads(RecordedFolder(path).read(_DECISION).decode())
        taken = {str(one["client"]): str(one["choice"]) for one in document["clients"]}
        runs = {str(name): path / place for name, place in document["runs"].items()}
        own = document["own"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(
            f"{path / _DECISION}: does not say which adapters were taken from which run, as those "
            "of older versions do not; repeat its fedmira decide command"
        ) from error
    saved: dict[str, SavedAdapters] = {}
    for name in dict.fromkeys([own, *taken.values()]):
        if name in runs:
            saved[name] = reload_adapters(runs[name], base)
            base = saved[name].kind.base
    alone = saved[own]
    other = [name for name, one in saved.items() if one.config.adapter != alone.config.adapter]
    if other:
        raise RunFolderError(
            f"{path}: adapters that were taken from {other[0]!r} have other settings than those of "
            f"{own!r}, so that they cannot be used together; give one of the runs, such as "
            f"{runs[other[0]]}"
        )

    def read(client: ClientId) -> Adapter:
        if taken[client] in saved:
            return saved[taken[client]].adapters[client]
        check_files(path / "adapters" / client)
        return alone.kind.read(path / "adapters" / client)

    return replace(alone, path=path, adapters=LazyAdapters(list(taken), read))


def refuse_other(folder: RunFolder, client: ClientId, entry: object, adapter: Adapter) -> None:
    """Refuses an adapter that is not the one of which index.json has the hash.

    Args:
        folder: of the run.
        client: whose adapter it is.
        entry: the client's in index.json.
        adapter: as it was read.

    Raises:
        RunFolderError: its content is another, or index.json does not say which it was.
    """
    about = entry if isinstance(entry, dict) else {}
    if about.get("sha256") != content_hash(adapter):
        raise RunFolderError(
            f"{folder.adapters / client}: the adapter is damaged: its content has another SHA-256 "
            "than adapters/index.json says; save it again from the checkpoint with: fedmira run "
            f"--resume --output {folder.path}, or put the file back from a copy"
        )


def clients_of(
    saved: SavedAdapters, rows: ObjectRows | None = None, *, choosing: bool = False
) -> LocalClients:
    """The run's clients with their rows, to measure the adapters; they do not train.

    Args:
        saved: the adapters.
        rows: of a run whose rows were objects.
        choosing: whether something is chosen by their validation rows, which must then be those
            that the run set aside.

    Raises:
        DataError: the rows cannot be read.
        RunFolderError: the rows of its clients are not on this machine, or, where they choose, are
            not those of the run.
    """
    config, kind = saved.config, saved.kind
    data = {
        client.client_id: client
        for client in load_clients(config.data, config.seed, kind.base.tokenizer, rows).clients
    }
    if absent := [client for client in saved.adapters if client not in data]:
        raise RunFolderError(
            f"{saved.path}: the rows of {_listed(absent)} are not on this machine, as [data] in "
            "its config.toml reads them; the run's own figures are in metrics/clients.csv"
        )
    same = hash_of_rows(data) == saved.data_sha256
    if choosing and not same and not saved.rows_elsewhere:
        raise RunFolderError(
            f"{saved.path}: the rows at {config.data.path!r} are not those of the run: they have "
            "changed, are split in another way, or were elsewhere. What would choose now may have "
            "been trained on; restore the rows, or run again with these"
        )
    if not same:
        _log.warning(
            "%s: these are not known to be the rows of the run: they have changed, are "
            "split in another way, or were elsewhere",
            saved.path,
        )
    scales = {client: kind.scale(rank) for client, rank in saved.ranks.items()}
    budget = token_budget(config, kind)
    widest = max(saved.ranks, key=lambda client: saved.ranks[client])
    largest = sum(tensor.numel() for tensor in saved.adapters[widest].values())
    at_once = most_side_by_side(largest, kind.base.device)
    settings = CohortSettings(config.local, scales, budget)
    references = references_of(kind, config.evaluation)
    return LocalClients(None, kind, data, settings, at_once, references)


def shared_prompt(
    saved: SavedAdapters,
    client: ClientId,
    instruction: str | None = None,
    rows: ObjectRows | None = None,
) -> dict[str, Any]:
    """What the prompts of a client's training rows share, as index.json has it.

    Args:
        saved: what the run has saved.
        client: its id.
        instruction: in place of the client's own.
        rows: of a run whose rows were objects.

    Raises:
        ConfigError: there is no such client, or no instruction is given and its rows are not on
            this machine.
    """
    refuse_unknown(saved, client)
    shared = dict(saved.prompts.get(client, {}))
    if instruction is not None:
        shared["instruction"] = instruction
    elif "instruction" not in shared:
        shared["instruction"] = _usual_instruction(saved, client, rows)
    return shared


def refuse_unknown(saved: SavedAdapters, client: ClientId) -> None:
    """Refuses a client that the run does not have.

    Args:
        saved: what the run has saved.
        client: its id.

    Raises:
        ConfigError: there is none of this name.
    """
    if client not in saved.adapters:
        raise ConfigError(
            f"{saved.path}: there is no client {client!r} in this run; its clients are "
            f"{_listed(list(saved.adapters))}"
        )


def quick_budget(saved: SavedAdapters) -> int:
    """Tokens in a pass as the run sets them, without a trial of this machine."""
    set_to = saved.config.engine.token_budget
    return usual_token_budget(saved.kind.base) if set_to == "auto" else set_to


def _usual_instruction(saved: SavedAdapters, client: ClientId, rows: ObjectRows | None) -> str:
    """That which all the client's training rows share, or none."""
    way_out = "give --instruction (an empty one where the task has none)"
    try:
        clients = load_clients(
            saved.config.data, saved.config.seed, saved.kind.base.tokenizer, rows
        ).clients
    except DataError as error:
        raise ConfigError(
            [
                f"the instruction of {client!r} is not known here, as its rows cannot be "
                f"read; {way_out}",
                *error.problems,
            ]
        ) from error
    found = next((each.instruction for each in clients if each.client_id == client), None)
    if found is None:
        raise ConfigError(
            f"the instruction of {client!r} is not known here, as its rows are on another "
            f"machine; {way_out}"
        )
    return found


def _listed(clients: Sequence[ClientId]) -> str:
    return f"{', '.join(clients[:12])}{' ...' if len(clients) > 12 else ''}"


def trained_rows(saved: SavedAdapters, rows: ObjectRows | None = None) -> OwnRows:
    """The rows that the adapters of a run were trained on, for what is known of them from these.

    Args:
        saved: the adapters.
        rows: of a run whose rows were objects.

    Raises:
        ConfigError: the run hides its rows, from which nothing more may be told.
        RunFolderError: they are not on this machine, or are not those of the run.
    """
    kind = saved.config.privacy.kind
    if kind != "none":
        raise ConfigError(
            f"{saved.path}: privacy.kind = {kind!r} hides what adapters were trained on, and no "
            "part of epsilon is set aside for precisions; merge by metagpt, rows, uniform or ties"
        )
    return OwnRows.trained_by(clients_of(saved, rows, choosing=True))
