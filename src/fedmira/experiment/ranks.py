"""Which LoRA rank each client has.

One for all, by list, by resource type, or drawn from FlexLoRA's distributions of types.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from fedmira.config import AdapterSettings, RankDistribution, ResourceType
from fedmira.errors import ConfigError
from fedmira.messages import ClientId
from fedmira.model import TargetModule
from fedmira.seeds import seed_for

__all__ = ["SHARES", "client_ranks", "draw_type", "rank_of_type"]

Shares = Mapping[ResourceType, float]


def _normal_shares() -> Shares:
    """The shares of types from light to heavy.

    The density of N(1.5, 0.7) at 0, 1, 2 and 3, made to sum to 1.
    """
    densities = [math.exp(-(((position - 1.5) / 0.7) ** 2) / 2) for position in range(4)]
    light, mid, mixed, heavy = (density / sum(densities) for density in densities)
    return {"light": light, "mid": mid, "mixed": mixed, "heavy": heavy}


SHARES: Mapping[RankDistribution, Shares] = MappingProxyType(
    {
        "uniform": {"light": 0.25, "mid": 0.25, "mixed": 0.25, "heavy": 0.25},
        "heavy-tail-light": {"light": 0.80, "mid": 0.05, "mixed": 0.05, "heavy": 0.10},
        "heavy-tail-strong": {"light": 0.05, "mid": 0.05, "mixed": 0.10, "heavy": 0.80},
        "normal": _normal_shares(),
    }
)
"""Distribution -> type -> its share of the clients.

FlexLoRA (Bai et al. 2024, arXiv 2402.11505), the proportions of its released code.
"""

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def client_ranks(
    settings: AdapterSettings,
    clients: Sequence[ClientId],
    targets: Sequence[TargetModule],
    run_seed: int,
    expected: Collection[ClientId] = frozenset(),
) -> dict[ClientId, int]:
    """Client -> rank.

    As `ranks` says, else by its type in `rank_types`, else by the type that is drawn for it, else
    `rank`.

    Adapters of another kind than LoRA have no rank; theirs is 0.

    Args:
        settings: of [adapter].
        clients: ids of all clients.
        targets: the adapted layers, which the rank of type "mixed" depends on.
        run_seed: a client's type depends on it and on the client's id, never on the other clients
            or their order.
        expected: names of clients that may come later, for which ranks may be set.

    Raises:
        ConfigError: a rank or a type is set for a client that does not exist.
    """
    if not settings.low_rank:
        return dict.fromkeys(clients, 0)
    given = {
        "adapter.ranks": sorted(settings.ranks),
        "adapter.rank_types": sorted(settings.rank_types),
    }
    known = f"{', '.join(clients[:8])}{' ...' if len(clients) > 8 else ''}"
    problems = [
        f"{key}: there is no client {client!r}; the clients are {known}"
        for key, names in given.items()
        for client in names
        if client not in clients and client not in expected
    ]
    if problems:
        raise ConfigError(problems)

    def rank(client: ClientId) -> int:
        if client in settings.ranks:
            return settings.ranks[client]
        if client in settings.rank_types:
            return rank_of_type(settings.rank_types[client], settings.type_ranks, targets)
        if settings.rank_distribution == "one":
            return settings.rank
        return rank_of_type(
            draw_type(settings.rank_distribution, run_seed, client), settings.type_ranks, targets
        )

    return {client: rank(client) for client in clients}


def draw_type(distribution: RankDistribution, run_seed: int, client: ClientId) -> ResourceType:
    """A client's type, drawn with the distribution's shares from a stream of the client's own.

    Args:
        distribution: any but "one", which draws nothing.
        run_seed: of the whole run.
        client: its id.
    """
    shares = SHARES[distribution]
    point = np.random.default_rng(seed_for(run_seed, "rank", client)).random()
    reached = 0.0
    for kind, share in shares.items():
        reached += share
        if point < reached:
            return kind
    return kind  # shares that add up to a little less than 1


def rank_of_type(
    kind: ResourceType, type_ranks: tuple[int, int, int], targets: Sequence[TargetModule]
) -> int:
    """The rank of a client of this type in all its layers.

    FlexLoRA's mixed type has the middle rank in attention and the large one in feed-forward layers.
    A client here has one rank in all layers; for this type it is the one that comes nearest to the
    same number of parameters.

    Args:
        kind: the client's type.
        type_ranks: of light, mid and heavy clients.
        targets: the adapted layers; a layer whose path names attention counts as attention.
    """
    light, mid, heavy = type_ranks
    if kind != "mixed":
        return {"light": light, "mid": mid, "heavy": heavy}[kind]
    widths = [
        target.inputs + target.outputs for target in targets
    ]  # a rank-r branch has r times so many parameters
    meant = sum(
        width * (mid if _ATTENTION.search(target.name) else heavy)
        for width, target in zip(widths, targets, strict=True)
    )
    return max(1, math.floor(meant / sum(widths) + 0.5))
