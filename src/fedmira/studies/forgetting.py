"""A client leaves a run: what it reached is trained again without it, the rest stays bit for bit.

What a client reached follows from who takes part in whose adapter. Where that cannot be told to the
bit (a learned graph, something common to all, clients in common passes), everybody is trained
again, which is what retraining is; the certificate says so.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedmira.adapters import Adapter, content_hash
from fedmira.config import Config, load_config
from fedmira.data import load_clients
from fedmira.errors import ConfigError, RunError, RunFolderError
from fedmira.experiment import (
    Experiment,
    build_experiment,
    prepare_kind,
    run_experiment,
    where_they_lay,
)
from fedmira.messages import ClientId
from fedmira.methods import Mira, mixing_matrix
from fedmira.model import load_base
from fedmira.observers import Observer
from fedmira.runs import RunFolder, write_page

__all__ = ["CERTIFICATE", "Forgotten", "check_certificate", "forget_client"]

CERTIFICATE = "forgotten.json"
Row = Mapping[ClientId, float]


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What came of it.

    Attributes:
        folder: the new run folder.
        certificate: the content of forgotten.json.
    """

    folder: Path
    certificate: Mapping[str, Any]


class _Resting(Observer):
    """Lets the clients rest whose adapters stay."""

    def __init__(self, clients: Collection[ClientId]) -> None:
        self._clients = clients

    def resting(self) -> Collection[str]:
        """Those that are not trained again."""
        return self._clients


def forget_client(run: Path, client: ClientId, output: Path) -> Forgotten:
    """Make a run folder that never had the client.

    Args:
        run: the folder of a finished run in one process. It stays as it is.
        client: who leaves.
        output: a new folder.

    Raises:
        RunError: clients failed in the replay.
        RunFolderError: the run has not finished, has no such client, or its rows changed.
        ConfigError: nobody or nothing to replay would be left.
    """
    folder, told = RunFolder.reopen(run), RunFolder.reopen(run).read_json("run.json")
    index: Any = folder.read_json("adapters/index.json")
    _refuse(run, client, told, index)
    config = load_config(run / "config.toml")
    before, after = _with_and_without(config, told, client)
    replayed, why = _reached(folder, before, after, client)
    kept = [name for name in after.ranks if name not in replayed]
    stored = {name: before.kind.read(folder.adapters / name) for name in kept}
    _same_as_saved(run, stored, index)
    begun = replace(after, starts={**after.starts, **stored})
    result = run_experiment(begun, output, [_Resting(kept)] if kept else [])
    made = RunFolder.reopen(output)
    if kept and '"failure"' in made.events.read_text(encoding="utf-8"):
        raise RunError(
            f"{output}: clients failed or were left out in the replay, where none did in the run, "
            "so nothing is certified; see its events.jsonl"
        )
    _keep(folder, made, kept)
    rounds = config.rounds.count
    adapters: Any = made.read_json("adapters/index.json")
    content: dict[str, Any] = {
        "forgotten": client,
        "run": told.get("id"),
        "base_sha256": after.base.sha256,
        "data_sha256": after.data_sha256,
        "replayed": sorted(replayed),
        "kept": sorted(kept),
        "why": why,
        "cost": {
            "client_rounds_replayed": len(replayed) * rounds,
            "client_rounds_of_retraining": len(after.ranks) * rounds,
        },
        "adapters": {name: adapters[name]["sha256"] for name in sorted(after.ranks)},
    }
    certificate = {**content, "sha256": _hash_of(content)}
    made.write_json(CERTIFICATE, certificate)
    write_page(result.folder)
    made.seal()
    return Forgotten(output, certificate)


def check_certificate(folder: Path, retrain_from: Path | None = None) -> list[str]:
    """What is wrong with a certificate; nothing where it holds.

    Args:
        folder: of a run that forgot a client.
        retrain_from: the run folder that it was made of: everybody is trained anew without the
            client, and the hashes must be equal. That costs a whole run.

    Raises:
        RunFolderError: there is no certificate.
    """
    made = RunFolder.reopen(folder)
    certificate: Any = made.read_json(CERTIFICATE)
    if not certificate:
        raise RunFolderError(
            f"{folder}: it has no {CERTIFICATE}; make one with: fedmira forget RUN --client ID"
        )
    content = {key: value for key, value in certificate.items() if key != "sha256"}
    problems = []
    if certificate.get("sha256") != _hash_of(content):
        problems.append(f"{CERTIFICATE} was changed: its own hash is another one")
    config = where_they_lay(load_config(folder / "config.toml"), made.read_json("run.json"))
    kind = prepare_kind(config)
    for name, sha256 in certificate["adapters"].items():
        if content_hash(kind.read(made.adapters / name)) != sha256:
            problems.append(f"the adapter of {name} is not the one that was certified")
    if certificate["forgotten"] in certificate["adapters"]:
        problems.append(f"{certificate['forgotten']} has an adapter")
    if retrain_from is not None:
        problems += _against_retraining(retrain_from, certificate)
    return problems


def _against_retraining(run: Path, certificate: Mapping[str, Any]) -> list[str]:
    """Whose adapter a run that never had the client makes otherwise."""
    folder = RunFolder.reopen(run)
    _, after = _with_and_without(
        load_config(run / "config.toml"), folder.read_json("run.json"), certificate["forgotten"]
    )
    with tempfile.TemporaryDirectory() as place:
        result = run_experiment(after, Path(place) / "run")
        index: Any = RunFolder.reopen(result.folder).read_json("adapters/index.json")
    return [
        f"the adapter of {name} is another one in a run that never had the client"
        for name, sha256 in certificate["adapters"].items()
        if index[name]["sha256"] != sha256
    ]


def _refuse(run: Path, client: ClientId, told: Mapping[str, Any], index: Mapping[str, Any]) -> None:
    if told.get("status") != "finished":
        raise RunFolderError(
            f"{run}: this run is {told.get('status', 'not there')}; only a finished one can be "
            f"replayed: finish it with fedmira run --resume --output {run}"
        )
    if "federation" in told:
        raise RunFolderError(
            f"{run}: its clients are on machines of their own; begin a new federation without "
            f"{client!r} (take it out of federation.clients)"
        )
    if client not in index:
        raise RunFolderError(f"{run}: no client {client!r}; it has {', '.join(index)}")
    if len(index) == 1:
        raise ConfigError(f"{run}: {client!r} is its only client; delete the folder")


def _with_and_without(
    config: Config, told: Mapping[str, Any], client: ClientId
) -> tuple[Experiment, Experiment]:
    """The run as it was built, and as it would have been without the client, on one base."""
    places = where_they_lay(config, dict(told))
    base = load_base(places.model)
    base = replace(base, name=config.model.base)
    read = places.data.model_copy(update={"clock": config.data.clock})
    dataset = load_clients(read, config.seed, base.tokenizer)
    before = build_experiment(config, base, dataset=dataset)
    if before.data_sha256 != told.get("data", {}).get("sha256"):
        raise RunFolderError(
            "the rows are not those that the run was made with, so it cannot be replayed; put "
            "them back (the leaver's too: what it reached is found with them)"
        )
    rest = tuple(each for each in dataset.clients if each.client_id != client)
    return before, build_experiment(config, base, dataset=replace(dataset, clients=rest))


def _reached(
    folder: RunFolder, before: Experiment, after: Experiment, client: ClientId
) -> tuple[set[ClientId], str]:
    """Who is trained again, and why."""
    everybody = set(after.ranks)
    problem = _not_to_the_bit(folder, before, after)
    if problem:
        return everybody, f"everybody: {problem}"
    method = before.algorithm
    if method.name == "local":
        return _one_of(after), "nobody was reached, and one trained so that the folder has rounds"
    old, new = _mixing(before, everybody | {client}), _mixing(after, everybody)
    reached = _connected(old, client) - {client}
    kept = everybody - reached
    changed = [name for name in kept if old[name] != new[name]]
    if changed:
        return everybody, (
            f"everybody: without {client} the mixing weights of {changed[0]}, whom it does not "
            "reach, are others (the largest degree of the graph sets the step of all; "
            "algorithm.server_step sets it for good)"
        )
    if not reached:
        return _one_of(after), "nobody was reached, and one trained so that the folder has rounds"
    alone = _mixing(after, reached)
    if any(alone[name] != new[name] for name in reached):
        return everybody, "everybody: the step of those it reached depends on the others"
    return reached, f"the clients that the graph joins to {client}, directly or through others"


def _one_of(experiment: Experiment) -> set[ClientId]:
    """The client with the fewest rows: a run folder without any round is none."""
    parties = experiment.parties
    return {min(sorted(parties), key=lambda name: parties[name].train_rows)}


def _not_to_the_bit(folder: RunFolder, before: Experiment, after: Experiment) -> str:
    """Why clients that the leaver did not reach could all the same have other bits; "" if not."""
    config, method = before.config, before.algorithm
    if not config.engine.apart:
        return (
            "clients trained in common passes, whose rounding depends on who is in them; train "
            "with engine.apart = true to replay single clients"
        )
    if config.rounds.participation < 1:
        return "rounds are drawn from all clients, and without one of them are others"
    if '"failure"' in folder.events.read_text(encoding="utf-8"):
        return "clients failed in the run, which no replay can repeat"
    if config.privacy.kind != "none":
        return "noise that was drawn in secret cannot be drawn again"
    if any(
        content_hash(before.starts[name]) != content_hash(start)
        for name, start in after.starts.items()
    ):
        return "without the client all start from another adapter, that of another largest rank"
    if method.name == "local":
        return ""
    if type(method) is not Mira:
        return f"with algorithm.name = {method.name!r} all clients have something in common"
    if before.graph.learned:
        return f"graph.kind = {config.graph.kind!r} is learned from all clients together"
    if not method.context.low_rank or method.may_decline:
        return "only LoRA adapters of clients that decline nothing are followed"
    return ""


def _mixing(experiment: Experiment, cohort: Collection[ClientId]) -> dict[ClientId, Row]:
    """Whom each client of a cohort is made of in every round, and with which weights."""
    method: Any = experiment.algorithm
    context = method.context
    clients = context.clients
    graph = context.graph.graph(context.graph.initial(clients), clients)
    inside = torch.tensor([name in cohort for name in clients])
    mixing = mixing_matrix(
        method,
        graph,
        inside,
        inside,
        torch.tensor([context.rows[name] for name in clients], dtype=torch.float64),
        context.graph.absolute,
        context.server.least_mixed,
    )
    return {
        name: {clients[place]: weight for place, weight in zip(*mixing.row(k), strict=True)}
        for k, name in enumerate(clients)
        if name in cohort
    }


def _connected(rows: Mapping[ClientId, Row], start: ClientId) -> set[ClientId]:
    """Everybody that something of a client comes to, in however many rounds."""
    found, new = {start}, {start}
    while new:
        new = {name for name, row in rows.items() if name not in found and found & set(row)}
        found |= new
    return found


def _same_as_saved(run: Path, stored: Mapping[ClientId, Adapter], index: Mapping[str, Any]) -> None:
    for name, adapter in stored.items():
        if content_hash(adapter) != index[name]["sha256"]:
            raise RunFolderError(
                f"{run}: the adapter of {name!r} is not the one that the run saved (its hash is "
                "another one); restore the folder"
            )


def _keep(old: RunFolder, new: RunFolder, kept: Sequence[ClientId]) -> None:
    """Folders, figures and table rows of those that were not trained again, as they were."""
    before: Any = old.read_json("adapters/index.json")
    index: Any = new.read_json("adapters/index.json")
    for name in kept:
        shutil.rmtree(new.adapters / name)
        shutil.copytree(old.adapters / name, new.adapters / name)
        index[name] = before[name]
    new.write_json("adapters/index.json", index)
    earlier = {row["client"]: row for row in _table(old.metrics / "clients.csv")}
    rows = [
        earlier[row["client"]] if row["client"] in kept else row
        for row in _table(new.metrics / "clients.csv")
    ]
    new.write_table("clients.csv", rows)


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _hash_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of a document in the one order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
