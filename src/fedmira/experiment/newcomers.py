"""A run with newcomers in it: the same parts, built for one client more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace

from fedmira.data import ClientSummary
from fedmira.errors import ConfigError
from fedmira.experiment.build import Experiment
from fedmira.experiment.privacy import privacy_plan
from fedmira.experiment.scheme import make_scheme
from fedmira.messages import ClientId

__all__ = ["with_newcomers", "with_those_who_wait", "without_edges"]


def with_newcomers(
    experiment: Experiment, newcomers: Mapping[ClientId, ClientSummary], number: int
) -> Experiment:
    """The experiment with clients behind those that it has; what these have does not change.

    Args:
        experiment: as it is.
        newcomers: what they say of themselves, by name.
        number: the first round that they can train in.

    Raises:
        ConfigError: the settings cannot work with them.
    """
    config, parties = experiment.config, {**experiment.parties, **newcomers}
    most = config.federation.most_clients
    if len(parties) > most:
        raise ConfigError(f"the run has as many clients as federation.most_clients allows ({most})")
    came = {**experiment.came, **dict.fromkeys(newcomers, number)}
    scheme = make_scheme(config, experiment.kind, parties, came)
    rows = {client: party.train_rows for client, party in parties.items()}
    told = [{"round": came[client], **asdict(parties[client])} for client in came]
    return replace(
        experiment,
        parties=parties,
        ranks=scheme.ranks,
        starts=scheme.starts,
        graph=scheme.graph,
        algorithm=scheme.algorithm,
        privacy=privacy_plan(config, rows),
        came=came,
        federation={**experiment.federation, "newcomers": told},
    )


def with_those_who_wait(
    experiment: Experiment, number: int
) -> tuple[Experiment, dict[ClientId, ClientSummary]]:
    """The experiment with those who wait at its door and can take part; the others are told why.

    Args:
        experiment: as it is; its door is open.
        number: of the round that comes next.

    Returns:
        The experiment, and what those say of themselves who are new in it.
    """
    door = experiment.door
    if door is None:
        return experiment, {}
    grown, taken = experiment, dict[ClientId, ClientSummary]()
    for client, party in door.waiting().items():
        try:
            grown = with_newcomers(experiment, {**taken, client: party}, number)
        except ConfigError as error:
            door.turn_away(client, f"client {client!r} cannot join: {error}")
        else:
            taken[client] = party
    return grown, taken


def without_edges(experiment: Experiment, newcomers: Iterable[ClientId]) -> list[str]:
    """A sentence for each newcomer whom a fixed graph relates to nobody.

    Args:
        experiment: with the newcomers.
        newcomers: their names.
    """
    source, clients = experiment.graph, tuple(experiment.ranks)
    if source.learned or not experiment.algorithm.uses_graph:
        return []
    graph = source.graph(source.initial(clients), clients)
    degrees = dict(zip(clients, graph.degrees.tolist(), strict=True))
    return [
        f"{client} has no edge in the graph ({graph.kind}), which is fixed: nobody is moved "
        "towards it, and it towards nobody"
        for client in newcomers
        if degrees[client] == 0
    ]
