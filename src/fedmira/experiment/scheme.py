"""What a run is made of, wherever its rows are.

Adapters on their base, and what follows from what the clients say of themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fedmira.adapters import Adapter
from fedmira.config import AbsentMethod, Config, GraphSettings
from fedmira.data import ClientSummary
from fedmira.errors import ConfigError, ModelError
from fedmira.experiment.ranks import client_ranks
from fedmira.graphs import GraphSource, graph_source
from fedmira.messages import ClientId
from fedmira.methods import Method, MethodContext
from fedmira.model import (
    AdapterKind,
    BaseModel,
    adapter_kind,
    load_base,
)
from fedmira.rounds import cohort_size
from fedmira.seeds import seed_for

__all__ = ["Scheme", "make_scheme", "method_of", "prepare_kind", "token_budget"]

_log = logging.getLogger("fedmira")


@dataclass(frozen=True)
class Scheme:
    """What is decided before round 1.

    Each client's rank and start, who is related, and how adapters are combined.

    Attributes:
        ranks: client id -> LoRA rank, 0 for kinds without one.
        starts: client id -> the adapter that it starts from.
        graph: who is related, round by round.
        algorithm: the method, built for these clients.
    """

    ranks: Mapping[ClientId, int]
    starts: Mapping[ClientId, Adapter]
    graph: GraphSource
    algorithm: Method


def prepare_kind(config: Config, base: BaseModel | None = None) -> AdapterKind:
    """The adapters of this run on its base model, which has the options of [engine].

    Args:
        config: the resolved settings.
        base: one that is loaded already, to share it between runs.

    Raises:
        InputError: the base cannot be loaded, or does not fit the config.
    """
    base = base or load_base(config.model)
    if config.model.sha256 not in (None, base.sha256):
        raise ModelError(
            "base: this is not the model of the run (its weights have the sha256 "
            f"{base.sha256[:12]}, the run's "
            f"{config.model.sha256[:12]}); give the model that it was made with, or begin a new run"
        )
    taken = config.adapter.positions
    if base.max_positions is not None and config.data.max_length + taken > base.max_positions:
        beside = f" beside adapter.virtual_tokens = {taken}" if taken else ""
        room = base.max_positions - taken
        raise ConfigError(
            f"data.max_length is {config.data.max_length}{beside}, but "
            f"{config.model.base!r} reads at most {base.max_positions} tokens; "
            + (
                f"set data.max_length to {room} or less"
                if room >= 8
                else "lower adapter.virtual_tokens"
            )
        )
    if base.mixing_positions is not None and config.data.max_length + taken > base.mixing_positions:
        _log.warning(
            "%s: a row of more than %d tokens changes the position frequencies of all rows "
            "in its pass, whoever's they are, so results "
            "depend on who trains together; set data.max_length to %d or less to keep "
            "clients apart",
            config.model.base,
            base.mixing_positions,
            base.mixing_positions - taken,
        )
    return adapter_kind(config.adapter, base, config.engine)


def token_budget(
    config: Config, kind: AdapterKind, step_tokens: float = 0.0, cohort: int = 1
) -> int:
    """The most tokens in one forward pass: as set, else what is fastest on this machine.

    Args:
        config: the resolved settings.
        kind: the adapters, on the base whose passes are tried.
        step_tokens: about those of a client's local step; 0 has a pass hold one client.
        cohort: clients of a round.
    """
    set_to = config.engine.token_budget
    return kind.token_budget(step_tokens, cohort) if set_to == "auto" else set_to


def make_scheme(
    config: Config,
    kind: AdapterKind,
    parties: Mapping[ClientId, ClientSummary],
    came: Mapping[ClientId, int] = MappingProxyType({}),
) -> Scheme:
    """Build the algorithm for these clients.

    Args:
        config: the resolved settings.
        kind: the adapters, on their base.
        parties: sorted by id; newcomers behind all others, in the order they came.
        came: newcomer -> the first round that it can train in.

    Raises:
        ConfigError: the settings cannot work on this federation.
    """
    clients, expected = tuple(parties), config.federation.expected
    ranks = client_ranks(config.adapter, list(clients), kind.targets, config.seed, expected)
    _check_rooms(ranks, came)
    categories = {client: party.category for client, party in parties.items()}
    rows = {client: party.train_rows for client, party in parties.items()}
    method = method_of(config)
    # A method that uses no graph must not fail for one, so that it gets one which needs nothing.
    related = config.graph if method.uses_graph else GraphSettings()
    seed = seed_for(config.seed, "graph")
    graph = graph_source(related, clients, categories, seed, rows, len(came), expected)
    at_once = cohort_size(len(clients), config.rounds)
    if config.rounds.min_replies > at_once:
        raise ConfigError(
            f"rounds.min_replies is {config.rounds.min_replies}, but a round has {at_once} "
            f"of {len(clients)} clients; lower it, or raise "
            "rounds.participation"
        )
    context = MethodContext(
        clients=clients,
        rows=rows,
        ranks=ranks,
        alpha=config.adapter.alpha,
        graph=graph,
        cohort=at_once,
        rounds=config.rounds.count,
        rslora=config.adapter.rslora,
        server=config.server,
        came=dict(came),  # of a type that reaches worker processes
    )
    algorithm = method.for_federation(context)
    if algorithm.aligns and not graph.acts(config.rounds.count):
        raise ConfigError(
            f"graph.warmup_rounds is {config.graph.warmup_rounds} and rounds.count "
            f"{config.rounds.count}: the graph would never "
            "act; set rounds.count above the warm-up, or graph.warmup_rounds to 0"
        )
    return Scheme(ranks, kind.starts(ranks, seed_for(config.seed, "start")), graph, algorithm)


def _check_rooms(ranks: Mapping[ClientId, int], came: Mapping[ClientId, int]) -> None:
    """Refuses a newcomer whose rank is beyond those that a run has begun with.

    What is common to all was made for these, and how it is divided may follow from the smallest.

    Raises:
        ConfigError: it is.
    """
    known = [rank for client, rank in ranks.items() if client not in came]
    for client in came:
        if not min(known) <= ranks[client] <= max(known):
            raise ConfigError(
                f"client {client!r} would have rank {ranks[client]}, but the run began with ranks "
                f"from {min(known)} to {max(known)}, for which its state was made; before a run "
                "begins, adapter.ranks can name those in federation.open"
            )


def method_of(config: Config) -> Method:
    """The method of a config.

    Raises:
        ConfigError: it was an object, which the config of a run folder cannot hold.
    """
    method = config.algorithm
    if isinstance(method, AbsentMethod):
        raise ConfigError(method.problem())
    assert isinstance(method, Method)
    return method
