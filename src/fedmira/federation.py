"""A run whose clients are on machines of their own: the same parts as in one process, with rows and training elsewhere."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fedmira.config import Config, dump_config
from fedmira.data import ClientSummary, check_apart
from fedmira.engines.wire import ServerEnd
from fedmira.errors import ConfigError, RunFolderError
from fedmira.experiment import Experiment, resume_experiment, run_experiment
from fedmira.messages import ClientId
from fedmira.model import tokenizer_hash
from fedmira.parts import make_scheme, prepare_kind
from fedmira.results import Result
from fedmira.rounds import Progress, RunFolder

if TYPE_CHECKING:
    from fedmira.engines.flower import Grid

__all__ = ["build_federation", "run_federation"]

_log = logging.getLogger("fedmira")


def run_federation(config: Config, grid: Grid, output: Path, *, resume: bool, progress: Progress | None = None) -> Result:
    """Run a federation, or continue the one in `output`.

    Raises:
        InputError: the settings cannot work, or too few nodes came that fit them; nothing was trained.
        RunError: the run failed; what was computed is in the folder.
    """
    names = _clients_of(RunFolder.reopen(output)) if resume else config.federation.clients
    experiment = build_federation(config, grid, output, names)
    start = resume_experiment if resume else run_experiment
    return start(experiment, output, progress)


def build_federation(config: Config, grid: Grid, output: Path, names: tuple[ClientId, ...]) -> Experiment:
    """Wait for the nodes, learn who they are, and build the run's parts.

    Args:
        output: the run folder; with the settings it names the run to the nodes, so that they know it again after a resume.
        names: the clients to wait for; empty waits for `federation.nodes` of any name.

    Raises:
        ConfigError: they did not come in time, or the settings cannot work on them.
    """
    from fedmira.engines.flower import FlowerEngine, FlowerEvaluation, Nodes

    settings = config.federation
    check_apart(config.data)
    kind = prepare_kind(config)
    base = kind.base
    nodes = Nodes(grid, base.sha256, tokenizer_hash(base.tokenizer), names, settings.reply_s)
    wanted = len(names) or settings.nodes
    _log.info("waiting for %d nodes, at most %g s", wanted, settings.wait_s)
    parties = nodes.gather(names, wanted, settings.wait_s)
    if len(parties) < wanted:
        missing = f"; missing: {', '.join(sorted(set(names) - set(parties)))}" if names else ""
        refusals = "".join(f"; {reason}" for reason in nodes.refusals)
        raise ConfigError(
            f"{len(parties)} of {wanted} nodes came within {settings.wait_s:g} s (federation.wait_s){missing}{refusals}; start the others, "
            "or lower federation.nodes"
        )
    nodes.close(parties)
    scheme = make_scheme(config, kind, parties)
    run_id = hashlib.sha256(json.dumps([str(output.resolve()), dump_config(config)]).encode()).hexdigest()[:16]
    engine = FlowerEngine(nodes, ServerEnd(config.engine.wire, run_id), config.rounds.min_replies, settings.wait_s)
    return Experiment(
        config,
        kind,
        parties,
        scheme.ranks,
        scheme.starts,
        scheme.graph,
        scheme.algorithm,
        engine,
        FlowerEvaluation(nodes, parties),
        _hash_of_parties(parties),
        None,
    )


def _hash_of_parties(parties: Mapping[ClientId, ClientSummary]) -> str:
    """SHA-256 over names and counts of rows: the rows themselves are elsewhere."""
    return hashlib.sha256(json.dumps([asdict(party) for party in parties.values()]).encode()).hexdigest()


def _clients_of(folder: RunFolder) -> tuple[ClientId, ...]:
    """The clients of a run that has begun.

    Raises:
        RunFolderError: the folder does not say.
    """
    data = folder.read_json("run.json").get("data")
    names = data.get("clients") if isinstance(data, dict) else None
    if not isinstance(names, list):
        raise RunFolderError(f"{folder.path}: run.json names no clients; the run had not begun, so start it anew in another folder")
    return tuple(names)
