"""A run whose clients are on machines of their own, or simulated by Flower.

The parts are those of one process, training is elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmira.config import Config
from fedmira.data import (
    ClientSummary,
    about_advantages,
    check_apart,
    check_clock,
    load_clients,
    read_rows,
    read_summary,
)
from fedmira.errors import ConfigError, RunFolderError
from fedmira.experiment import (
    Experiment,
    make_scheme,
    prepare_kind,
    privacy_plan,
    start_experiment,
    with_newcomers,
)
from fedmira.federation.audit import AuditLog, audit_beside
from fedmira.federation.ends import ServerEnd
from fedmira.federation.node import memory_beside
from fedmira.messages import ClientId
from fedmira.model import AdapterKind, check_ids, load_base, load_tokenizer, tokenizer_hash
from fedmira.observers import Observer
from fedmira.runs import NEWCOMERS, CheckpointFolder, Result, RunFolder, hash_of_rows

if TYPE_CHECKING:
    from fedmira.federation.flower.nodes import Grid, Nodes

__all__ = ["Members", "build_federation", "build_simulation", "run_federation"]

_log = logging.getLogger("fedmira")


def run_federation(
    config: Config,
    grid: Grid,
    output: Path,
    *,
    resume: bool,
    simulated: bool = False,
    observers: Sequence[Observer] = (),
) -> Result:
    """Run a federation, or continue the one in `output`.

    Args:
        config: the resolved settings.
        grid: Flower's, by which nodes are reached.
        output: the run folder.
        resume: whether the run in `output` is continued.
        simulated: Flower simulates the nodes, and their rows are the run's own data.
        observers: who is told what happens.

    Raises:
        InputError: the settings cannot work, or too few nodes came that fit them; nothing was
            trained.
        RunError: the run failed; what was computed is in the folder.
    """
    before = _read_members(RunFolder.reopen(output), config) if resume else None
    experiment = (build_simulation if simulated else build_federation)(config, grid, output, before)
    return start_experiment(experiment, output, observers, resume=resume)


@dataclass(frozen=True, slots=True)
class Members:
    """Who takes part in a run, and the name under which their nodes remember it.

    Both stay the same when it is resumed.

    Attributes:
        run_id: drawn at random when the run begins.
        parties: what each client says of itself that the run began with.
        newcomers: the same of those who have come since, in their order.
        came: newcomer -> the first round that it can train in.
    """

    run_id: str
    parties: Mapping[ClientId, ClientSummary]
    newcomers: Mapping[ClientId, ClientSummary] = field(default_factory=dict)
    came: Mapping[ClientId, int] = field(default_factory=dict)

    @property
    def everybody(self) -> dict[ClientId, ClientSummary]:
        """What all clients say of themselves, newcomers last."""
        return {**self.parties, **self.newcomers}

    def as_json(self) -> dict[str, object]:
        """The federation as run.json has it before anybody joins: its identity and parties."""
        return {
            "run_id": self.run_id,
            "parties": [asdict(party) for party in self.parties.values()],
        }


def build_federation(
    config: Config, grid: Grid, output: Path, before: Members | None = None
) -> Experiment:
    """Wait for the nodes, learn who they are, and build the run's parts.

    Args:
        config: the resolved settings.
        grid: Flower's, by which nodes are reached.
        output: the run folder.
        before: who took part so far, where a run is resumed. All of them are waited for, but
            `rounds.min_replies` suffice: the others may come back later.

    Raises:
        ConfigError: they did not come in time, or the settings cannot work on them.
    """
    settings = config.federation
    check_apart(config.data)
    _refuse_few_rows(config)
    kind = prepare_kind(config)
    names = tuple(before.everybody) if before else settings.clients
    nodes = _nodes(config, grid, kind, names, AuditLog(audit_beside(output)))
    if before:
        nodes.close(before.everybody)
    wanted = len(names) or settings.nodes
    enough = min(config.rounds.min_replies, wanted) if before else wanted
    _log.info("waiting for %d nodes, at most %g s", wanted, settings.wait_s)
    parties = nodes.gather(names, wanted, settings.wait_s)
    missing = sorted(set(names) - set(parties))
    if len(parties) < enough:
        absent = f"; missing: {', '.join(missing)}" if missing else ""
        refusals = "".join(f"; {reason}" for reason in nodes.refusals)
        way_out = "then resume again" if before else "or lower federation.nodes"
        raise ConfigError(
            f"{len(parties)} of {wanted} nodes came within {settings.wait_s:g} s "
            f"(federation.wait_s){absent}{refusals}; start the others, "
            f"{way_out}"
        )
    if before and missing:
        _log.warning("going on without %s, who may come back later", ", ".join(missing))
    members = before or Members(secrets.token_hex(8), parties)
    if settings.open and len(members.parties) >= settings.most_clients:
        raise ConfigError(
            f"federation.open: the run begins with {len(members.parties)} clients, and "
            f"federation.most_clients is {settings.most_clients}, so that nobody could join; "
            "raise it, or leave federation.open out"
        )
    return _experiment(config, kind, nodes, members, _hash_of_parties(members.parties))


def build_simulation(
    config: Config, grid: Grid, output: Path, before: Members | None = None
) -> Experiment:
    """Load the data, wait for the nodes that Flower simulates, and build the run's parts.

    Args:
        config: the resolved settings.
        grid: Flower's, by which nodes are reached.
        output: the run folder; the clients' private memories are kept beside it.
        before: who took part so far, where a run is resumed.

    Raises:
        ConfigError: a node was refused or did not come in time, or the settings cannot work.
        DataError: the clients cannot be made.
    """
    if config.federation.open:
        raise ConfigError(
            "federation.open: the clients of a simulation are those of the run's own data, all of "
            "them from the beginning; leave it out"
        )
    _refuse_few_rows(config)
    rows = read_rows(config.data, config.seed)
    tokenizer = load_tokenizer(config.model)
    check_clock(config.data, tokenizer)
    dataset = load_clients(config.data, config.seed, tokenizer, rows)
    kind = prepare_kind(config, load_base(config.model, tokenizer))
    clients = {client.client_id: client for client in dataset.clients}
    check_ids(kind.base, {name: client.rows for name, client in clients.items()})
    for note in about_advantages(dataset.clients, config.local.advantage_temperature):
        _log.warning("%s", note)
    memory_beside(output).mkdir(parents=True, exist_ok=True)
    nodes = _nodes(config, grid, kind, tuple(clients))
    parties = nodes.gather((), len(clients), config.federation.wait_s, until_refused=True)
    if len(parties) < len(clients):
        reasons = (
            "; ".join(dict.fromkeys(nodes.refusals))
            or "set it higher where the base takes long to load"
        )
        waited = f"{config.federation.wait_s:g} s (federation.wait_s)"
        raise ConfigError(
            f"{len(parties)} of {len(clients)} simulated clients are there, after {waited} "
            f"at most: {reasons}"
        )
    members = before or Members(secrets.token_hex(8), parties)
    return _experiment(
        config=config,
        kind=kind,
        nodes=nodes,
        members=members,
        data_sha256=hash_of_rows(clients),
        skipped=dataset.skipped,
    )


def _refuse_few_rows(config: Config) -> None:
    """Nodes measure all of their rows, whatever a server would like to see of them."""
    if config.evaluation.rows:
        raise ConfigError(
            f"evaluation.rows = {config.evaluation.rows} is of runs whose rows are here, and nodes "
            "measure all of theirs; set it to 0, and evaluation.every higher to measure less often"
        )


def _nodes(
    config: Config,
    grid: Grid,
    kind: AdapterKind,
    names: tuple[ClientId, ...],
    audit: AuditLog | None = None,
) -> Nodes:
    """The nodes of the grid; those with the server's base and tokenizer may take part.

    A simulation keeps no record of messages: all of them are one party's.
    """
    from fedmira.federation.flower.nodes import Nodes

    return Nodes(
        grid,
        kind.base.sha256,
        tokenizer_hash(kind.base.tokenizer),
        names,
        config.federation.reply_s,
        audit,
        config.federation.may_join if config.federation.open else None,
    )


def _experiment(
    config: Config,
    kind: AdapterKind,
    nodes: Nodes,
    members: Members,
    data_sha256: str,
    skipped: tuple[str, ...] = (),
) -> Experiment:
    """The run's parts for these clients; no others may take part from now on, but newcomers."""
    from fedmira.federation.flower.clients import FlowerClients

    parties = members.parties
    nodes.close(parties)
    scheme = make_scheme(config, kind, parties)
    clients = FlowerClients(
        nodes,
        parties,
        ServerEnd(config.engine.wire, members.run_id),
        config.rounds.min_replies,
        config.federation.wait_s,
    )
    experiment = Experiment(
        config=config,
        kind=kind,
        parties=parties,
        ranks=scheme.ranks,
        starts=scheme.starts,
        graph=scheme.graph,
        algorithm=scheme.algorithm,
        clients=clients,
        data_sha256=data_sha256,
        token_budget=None,
        skipped=skipped,
        federation=members.as_json(),
        privacy=privacy_plan(
            config, {client: party.train_rows for client, party in parties.items()}
        ),
        door=clients if config.federation.open else None,
    )
    # Built step by step, as while they came: what was decided before does not depend on them.
    for client, party in members.newcomers.items():
        clients.admit({client: party})
        experiment = with_newcomers(experiment, {client: party}, members.came[client])
    return experiment


def _hash_of_parties(parties: Mapping[ClientId, ClientSummary]) -> str:
    """SHA-256 over names and counts of rows: the rows themselves are elsewhere."""
    return hashlib.sha256(
        json.dumps([asdict(party) for party in parties.values()]).encode()
    ).hexdigest()


def _read_members(folder: RunFolder, config: Config) -> Members:
    """Who takes part in a run that has begun; newcomers as its last checkpoint has them.

    Args:
        folder: of the run.
        config: its settings.

    Raises:
        RunFolderError: the folder does not say.
    """
    try:
        about: Any = folder.run_json()["federation"]
        parties = [read_summary(values) for values in about["parties"]]
        run_id = str(about["run_id"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{folder.path}: run.json does not say who takes part; the run is no "
            "federation, or had not begun: start it anew elsewhere"
        ) from error
    found = Members(run_id, {party.client_id: party for party in parties})
    if not config.federation.open:
        return found
    checkpoint = CheckpointFolder(folder.checkpoint).load(folder.lost_lines)
    listed: Any = checkpoint.values.get(NEWCOMERS, []) if checkpoint else []
    came = {str(each["client_id"]): int(each["round"]) for each in listed}
    newcomers = {
        str(each["client_id"]): read_summary({k: v for k, v in each.items() if k != "round"})
        for each in listed
    }
    return replace(found, newcomers=newcomers, came=came)
