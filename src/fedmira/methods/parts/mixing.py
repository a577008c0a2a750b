"""How far each client of a round moves towards whom.

The clients' rows of the row-stochastic matrix P of MIRA's server step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedmira.graphs import Graph

__all__ = ["Mixing", "Strengths", "comparable_weights", "mixing_matrix"]

ROUNDING = 1e-9
"""A pull above 1 by less than this is the rounding of a degree, not a step that is too large."""


MOST_UNEQUAL = 100.0
"""Updates of which one is longer than so many times the other are not mixed.

Whoever sends next to nothing would be handed the others' adapter, and whoever sends far too much
would make all of theirs.
"""


class Strengths(Protocol):
    """The settings of a server step, as MIRA has them."""

    @property
    def coupling(self) -> float:
        """kappa = gamma * max degree."""
        ...

    @property
    def server_step(self) -> float | None:
        """gamma itself, in place of the coupling."""
        ...

    @property
    def size_scale(self) -> float:
        """Rows at which a client moves half as far; 0 switches it off."""
        ...

    @property
    def neighbours(self) -> Literal["fresh", "rescaled", "stale"]:
        """Who pulls the clients of the round."""
        ...


@dataclass(frozen=True, slots=True)
class Mixing:
    """One server step: P, with only the entries beside the diagonal of the clients that move.

    Row k of P is what client k is made of; rows sum to 1, entries are 0 or more, and the row of a
    client that does not move is that of the identity.

    Attributes:
        rows, columns: client and neighbour of each entry, int64 [N], ordered by row and then by
            column.
        steps: P_kl of each entry, above 0, float64 [N].
        pulls: 1 - P_kk, the share of the way to the mean of its neighbours, float64 [K].
        server_step: gamma, after the guard.
        guarded: whether gamma was cut so that nobody overshoots its neighbours.
    """

    rows: Tensor
    columns: Tensor
    steps: Tensor
    pulls: Tensor
    server_step: float
    guarded: bool

    def row(self, k: int) -> tuple[list[int], list[float]]:
        """The clients that client k is made of, in ascending order, and their weights.

        Client k is one of them even if its own weight is 0.
        """
        first, last = torch.searchsorted(self.rows, torch.tensor([k, k + 1])).tolist()
        entries = dict(
            zip(self.columns[first:last].tolist(), self.steps[first:last].tolist(), strict=True)
        )
        entries[k] = 1 - float(self.pulls[k])
        positions = sorted(entries)
        return positions, [entries[position] for position in positions]

    def matrix(self) -> Tensor:
        """The whole of P, float64 [K, K]: for few clients."""
        matrix = torch.diag(1 - self.pulls)
        matrix[self.rows, self.columns] = self.steps
        return matrix


def _fresh(cohort: Tensor, trained: Tensor) -> tuple[Tensor, float]:
    """Clients of this round, as they are: the pull shrinks with participation."""
    return cohort, 1.0


def _rescaled(cohort: Tensor, trained: Tensor) -> tuple[Tensor, float]:
    """Clients of this round, times (K - 1) / (|S| - 1).

    Given that k is in it, the mean over cohorts is the full Laplacian.
    """
    others = int(cohort.sum()) - 1
    return cohort, (len(cohort) - 1) / others if others else 0.0


def _stale(cohort: Tensor, trained: Tensor) -> tuple[Tensor, float]:
    """All clients that ever trained, as they are stored."""
    return trained, 1.0


_POLICIES: Mapping[str, Callable[[Tensor, Tensor], tuple[Tensor, float]]] = {
    "fresh": _fresh,
    "rescaled": _rescaled,
    "stale": _stale,
}


def _server_step(settings: Strengths, graph: Graph, absolute: bool) -> float:
    """gamma before the guard: as set, the coupling, or coupling / max degree of the whole graph.

    0 without edges.
    """
    max_degree = float(graph.degrees.max())
    if max_degree == 0:
        return 0.0
    if settings.server_step is not None:
        return settings.server_step
    return settings.coupling if absolute else settings.coupling / max_degree


def _acting(graph: Graph, cohort: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Edges that pull a client of the cohort towards a neighbour.

    Row, column and weight, ordered by row and then by column.
    """
    both = torch.cat([graph.pairs, graph.pairs.flip(dims=(1,))])
    chosen = cohort[both[:, 0]] & neighbours[both[:, 1]]
    rows, columns = both[chosen].unbind(dim=1)
    order = torch.argsort(rows * len(cohort) + columns)
    return rows[order], columns[order], graph.edge_weights.repeat(2)[chosen][order]


def mixing_matrix(
    settings: Strengths,
    graph: Graph,
    cohort: Tensor,
    trained: Tensor,
    rows: Tensor,
    absolute: bool = False,
    least_mixed: int = 1,
) -> Mixing:
    """P_kl = gamma_k c a_kl for k in the cohort and l among its neighbours, P_kk = 1 - sum_l P_kl.

    Elsewhere P is the identity.

    gamma_k = gamma * size_scale / (size_scale + rows_k): clients with much data of their own move
    less. When the largest pull gamma_k c sum_l a_kl is above 1, gamma is cut for all clients so
    that it is 1.

    Args:
        settings: coupling or server_step, size_scale, neighbours.
        graph: the weights a_kl.
        cohort: clients that trained in this round, bool [K].
        trained: clients that ever trained, those of this round included, bool [K].
        rows: training rows of each client, float64 [K]; read for the cohort.
        absolute: whether a degree is the share of the way by itself, and the coupling is gamma.
        least_mixed: neighbours that a client is moved towards together: the m-th largest step of
            each client bounds its larger ones, so that no neighbour is more than 1 / m of them. Who
            has fewer neighbours stays where it is.
    """
    neighbours, factor = _POLICIES[settings.neighbours](cohort, trained)
    gamma = _server_step(settings, graph, absolute)
    share = (
        settings.size_scale / (settings.size_scale + rows)
        if settings.size_scale > 0
        else torch.ones_like(rows)
    )
    clients, others, weights = _acting(graph, cohort, neighbours)
    steps = gamma * factor * share[clients] * weights
    if least_mixed > 1:
        steps = _evened(steps, clients, len(rows), least_mixed)
    strongest = float(_sums(steps, clients, len(rows)).max())
    if strongest > 1:
        steps, gamma = steps / strongest, gamma / strongest
    pulls = _sums(steps, clients, len(rows)).clamp_max(1)
    moving = steps > 0
    return Mixing(
        clients[moving], others[moving], steps[moving], pulls, gamma, strongest > 1 + ROUNDING
    )


def _sums(steps: Tensor, clients: Tensor, count: int) -> Tensor:
    """Sum of each client's steps, float64 [K]."""
    return torch.zeros(count, dtype=torch.float64).index_add_(0, clients, steps)


def _evened(steps: Tensor, clients: Tensor, count: int, least: int) -> Tensor:
    """Each client's steps, none of them larger than its `least`-th largest; 0 where it has none."""
    bounds = torch.zeros(count, dtype=torch.float64)
    for client in set(clients.tolist()):
        own = steps[clients == client]
        if len(own) >= least:
            bounds[client] = own.topk(least).values[-1]
    return torch.minimum(steps, bounds[clients])


def comparable_weights(weights: Sequence[float], lengths: Sequence[float], own: int) -> list[float]:
    """A client's row of P without those whose update is of another order than its own.

    Their weight goes to the client itself.

    Args:
        weights: of the client and its neighbours.
        lengths: norms of their updates.
        own: the client's place among them.
    """
    length = lengths[own]
    kept = [
        weight if max(length, other) <= MOST_UNEQUAL * min(length, other) else 0.0
        for weight, other in zip(weights, lengths, strict=True)
    ]
    if kept == list(weights):
        return kept
    kept[own] = 1 - sum(weight for place, weight in enumerate(kept) if place != own)
    return kept
