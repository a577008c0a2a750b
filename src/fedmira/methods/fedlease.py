"""Clients alone at first, then one shared adapter for each cluster of clients.

After FedLEASE: Wang et al. 2025, "Adaptive LoRA Experts Allocation and Selection for Federated
Fine-Tuning", NeurIPS 2025. Kept of it are the clusters:

    warm-up:        every client trains alone, from the common start
    then, once:     d_kl = 1 - mean over modules of cos(B_k, B_l)
                    average linkage; of 2 ... most_clusters clusters those of the largest mean
                    silhouette; one cluster where no silhouette is above 0
    from then on:   E_j <- sum_k n_k / n  w_k       the expert of cluster j, over its clients of the
                                                    round, which begin from E_j

Not kept is its router, which weighs several experts anew for every input and would be no LoRA
adapter any more: here a client trains and has the expert of its own cluster alone, and what other
clusters learn does not reach it. A learned weight for the other experts, one a layer, would fold
into LoRA, but needs a trainer that trains it. The authors weigh clients alike; here it is by rows,
as in FedAvg. With one cluster and a warm-up of one round it is FedAvg where all take part.

The authors have all clients in the warm-up. Here a client that is not drawn in it trains from the
common start when its turn comes, is put into the cluster that its B is nearest to on average, and
its adapter counts from its next round on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedmira.adapters import Adapter, dot_products, replaced, weighted_sum
from fedmira.adapters.low_rank import UP
from fedmira.config.methods import Need
from fedmira.config.section import Positive, setting
from fedmira.errors import ConfigError
from fedmira.graphs import MOST_EDGES, all_pairs
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import Combined, Diagnostics, Method, ServerState
from fedmira.methods.parts.averaging import mean_of

__all__ = ["FedLease", "average_linkage", "chosen_clusters", "silhouette"]

CLUSTER, TRAINED = "cluster", "trained"
EXPERT = "*expert-"
"""In states, before the number of a cluster. The star is in no client's id."""
NOWHERE = -1
"""The cluster of a client that is in none yet."""
ROUNDING = 1e-9
"""Distances and gains of a silhouette below this are rounding."""
AT_A_TIME = 32
"""Adapters in memory at a time while they are compared."""


def average_linkage(distances: Tensor, most: int) -> dict[int, Tensor]:
    """Joins the two nearest clusters, by mean distance of their members, until one is left.

    >>> import torch
    >>> from fedmira.methods.fedlease import average_linkage
    >>> line = torch.tensor([0.0, 1.0, 5.0])
    >>> average_linkage((line[:, None] - line).abs(), 2)[2].tolist()
    [0, 0, 1]

    Args:
        distances: symmetric, float64 [n, n].
        most: the largest number of clusters that is of interest.

    Returns:
        Number of clusters, from the smaller of `most` and n down to 1 -> the cluster of each, int64
        [n], numbered in the order of their first members.
    """
    count = len(distances)
    between = distances.clone().fill_diagonal_(math.inf)
    sizes, labels = torch.ones(count, dtype=torch.float64), torch.arange(count)
    found = {count: labels.clone()} if count <= most else {}
    for left in range(count - 1, 0, -1):
        keep, drop = sorted(divmod(int(between.argmin()), count))
        total = sizes[keep] + sizes[drop]
        joined = (sizes[keep] * between[keep] + sizes[drop] * between[drop]) / total
        between[keep], between[:, keep] = joined, joined
        between[drop], between[:, drop], between[keep, keep] = math.inf, math.inf, math.inf
        sizes[keep] = total
        labels[labels == drop] = keep
        if left <= most:
            found[left] = torch.unique(labels, return_inverse=True)[1]
    return found


def silhouette(distances: Tensor, labels: Tensor) -> float:
    """The mean over all of (b - a) / max(a, b).

    a is the mean distance to the others of the own cluster, b to those of the nearest other one;
    who is alone in a cluster counts 0.

    Args:
        distances: symmetric, float64 [n, n], with zeros on the diagonal.
        labels: the cluster of each, 0 to M - 1 with M at least 2, int64 [n].
    """
    members = torch.nn.functional.one_hot(labels).to(torch.float64)
    sizes, sums = members.sum(dim=0), distances @ members
    own = sums.gather(1, labels[:, None])[:, 0] / (sizes[labels] - 1).clamp_min(1)
    other = (sums / sizes).masked_fill(members.bool(), math.inf).amin(dim=1)
    largest = torch.maximum(own, other)
    widths = torch.where(largest > 0, (other - own) / largest, 0.0)
    return float(torch.where(sizes[labels] > 1, widths, 0.0).mean())


def chosen_clusters(distances: Tensor, most: int) -> tuple[Tensor, float]:
    """The clusters of the largest mean silhouette; the fewest of several that have it.

    Args:
        distances: symmetric, float64 [n, n], with zeros on the diagonal.
        most: of them.

    Returns:
        The cluster of each, int64 [n], and the silhouette. All are in one cluster, with 0, where no
        division has a silhouette above 0.
    """
    divisions = average_linkage(distances, min(most, len(distances) - 1))
    best, score = torch.zeros(len(distances), dtype=torch.int64), 0.0
    for count, labels in sorted(divisions.items(), key=lambda division: division[0]):
        if count == 1:
            continue
        width = silhouette(distances, labels)
        if width > score + ROUNDING:
            best, score = labels, width
    return best, score


class FedLease(Method):
    """The state holds each client's adapter of its warm-up and the experts "*expert-j".

    Its numbers are "cluster" (int64 [K], -1 = none yet) and "trained" (bool [K]).
    """

    name: ClassVar[str] = "fedlease"
    title: ClassVar[str] = "FedLEASE without router"
    takes_newcomers: ClassVar[bool] = True
    uses_graph: ClassVar[bool] = False
    averages: ClassVar[bool] = True
    always_needs: ClassVar[Mapping[Need, str]] = {Need.ONE_RANK: "", Need.FACTORS: ""}
    warmup_share: float = setting(
        0.2,
        gt=0,
        lt=1,
        help=(
            "share of the rounds in which clients train alone before they are put into clusters, "
            "rounded down; at least one round, and at least one is left. Nothing is averaged in it"
        ),
    )
    most_clusters: Positive = setting(
        4,
        help="most clusters; how many there are is chosen by their silhouette. 1 divides nobody",
    )

    @property
    def warmup_rounds(self) -> int:
        """Rounds in which every client is alone."""
        return max(1, int(self.warmup_share * self.context.rounds))

    def check(self) -> None:
        """There must be clients to choose clusters from, and rounds to train them in.

        Raises:
            ConfigError: there are too few clients or rounds, or too many pairs of clients.
        """
        context, pairs = self.context, all_pairs(len(self.context.clients))
        if context.rounds < 2:
            raise ConfigError(
                f"{self.name}: rounds.count is {context.rounds}; needs at least 2, one for the "
                "warm-up and one for the clusters (raise rounds.count, or set algorithm.name to "
                "'local')"
            )
        if pairs > MOST_EDGES:
            raise ConfigError(
                f"{self.name}: clusters are made of the distances of all {pairs:,} pairs of "
                f"{len(context.clients):,} clients; at most {MOST_EDGES:,} can be held (lower "
                "data.clients, or set algorithm.name to 'fedavg')"
            )
        trainings = min(len(context.clients), context.cohort * self.warmup_rounds)
        if trainings < 3 and self.most_clusters > 1:
            raise ConfigError(
                f"{self.name}: at most {trainings} of {len(context.clients)} clients train in the "
                f"warm-up of {self.warmup_rounds} round{'s' if self.warmup_rounds > 1 else ''}; "
                "clusters can be chosen from 3 on (raise rounds.participation or "
                "algorithm.warmup_share, or set algorithm.name to 'fedavg')"
            )

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The common start; nobody has trained and there are no clusters."""
        count = len(self.context.clients)
        numbers = {
            CLUSTER: torch.full((count,), NOWHERE),
            TRAINED: torch.zeros(count, dtype=torch.bool),
        }
        return ServerState(dict(starts), numbers)

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """The expert of the client's cluster; its own adapter while it is in none."""
        return Payload({"adapter": self.adapter_for(state, client)})

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Keep what clients without a cluster trained; average the others within their clusters.

        Behind the last round of the warm-up, and whenever somebody trains for the first time after
        it, clients are put into clusters.
        """
        clients, numbers = self.context.clients, dict(state.numbers)
        formed = bool((numbers[CLUSTER] != NOWHERE).any())
        new = [reply for reply in replies if self._cluster(state, reply.client_id) == NOWHERE]
        changes: dict[str, Adapter] = {
            reply.client_id: reply.payload.tensors["adapter"] for reply in new
        }
        for cluster in sorted({self._cluster(state, reply.client_id) for reply in replies}):
            inside = [each for each in replies if self._cluster(state, each.client_id) == cluster]
            if cluster != NOWHERE:
                changes[f"{EXPERT}{cluster}"] = mean_of(inside, self.context.server)
        trained = numbers[TRAINED].clone()
        trained[[clients.index(reply.client_id) for reply in new]] = True
        numbers[TRAINED] = trained
        adapters, figures = replaced(state.adapters, changes), {}
        if not formed and replies[0].round >= self.warmup_rounds:
            numbers[CLUSTER], experts, width = self._formed(adapters, trained)
            adapters, figures = replaced(adapters, experts), {"silhouette": width}
        elif formed and new:
            numbers[CLUSTER] = self._placed(adapters, numbers[CLUSTER], list(changes))
        after = ServerState(adapters, numbers)
        return Combined(after, self._diagnostics(after, replies, figures))

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """The expert of the client's cluster; its own adapter, or the start, while in none."""
        cluster = self._cluster(state, client)
        return state.adapters[client if cluster == NOWHERE else f"{EXPERT}{cluster}"]

    def _cluster(self, state: ServerState, client: ClientId) -> int:
        return int(state.numbers[CLUSTER][self.context.clients.index(client)])

    def _formed(
        self, adapters: Mapping[str, Adapter], trained: Tensor
    ) -> tuple[Tensor, dict[str, Adapter], float]:
        """The clusters of the clients that have trained, their experts, and the silhouette."""
        names = [self.context.clients[k] for k in torch.nonzero(trained).flatten().tolist()]
        labels, width = torch.zeros(len(names), dtype=torch.int64), 0.0
        if len(names) > 2 and self.most_clusters > 1:
            distances = _distances(adapters, names, names).fill_diagonal_(0)
            labels, width = chosen_clusters((distances + distances.T) / 2, self.most_clusters)
        clusters = torch.full((len(self.context.clients),), NOWHERE)
        clusters[trained] = labels
        experts: dict[str, Adapter] = {}
        for cluster in range(int(labels.max()) + 1):
            inside = sorted(
                name for name, label in zip(names, labels.tolist(), strict=True) if label == cluster
            )
            rows = [self.context.rows[name] for name in inside]
            weights = [count / sum(rows) for count in rows]
            experts[f"{EXPERT}{cluster}"] = weighted_sum([adapters[n] for n in inside], weights)
        return clusters, experts, width

    def _placed(
        self, adapters: Mapping[str, Adapter], clusters: Tensor, names: Sequence[str]
    ) -> Tensor:
        """The clusters with those of `names` that are clients and had none in the nearest one."""
        clients, placed = self.context.clients, clusters.clone()
        inside = torch.nonzero(clusters != NOWHERE).flatten()
        new = [name for name in names if not name.startswith(EXPERT)]
        distances = _distances(adapters, new, [clients[k] for k in inside.tolist()])
        members = torch.nn.functional.one_hot(clusters[inside]).to(torch.float64)
        nearest = (distances @ members / members.sum(dim=0)).argmin(dim=1)
        placed[[clients.index(name) for name in new]] = nearest
        return placed

    def _diagnostics(
        self, state: ServerState, replies: Sequence[Reply], figures: Mapping[str, float]
    ) -> Diagnostics:
        """How many clusters there are, who is in none yet, and where the round's clients are."""
        clusters = state.numbers[CLUSTER]
        return Diagnostics(
            {
                "clusters": float(clusters.max()) + 1,
                "without_cluster": float((clusters == NOWHERE).sum()),
                **figures,
            },
            {
                reply.client_id: {"cluster": float(self._cluster(state, reply.client_id))}
                for reply in replies
            },
        )


def _distances(
    adapters: Mapping[str, Adapter], rows: Sequence[str], columns: Sequence[str]
) -> Tensor:
    """1 - mean over modules of the cosines of B, float64 [rows, columns]; two zeros are alike."""
    blocks = []
    for first in range(0, len(rows), AT_A_TIME):
        left = [_directions(adapters[name]) for name in rows[first : first + AT_A_TIME]]
        line = []
        for start in range(0, len(columns), AT_A_TIME):
            right = [_directions(adapters[name]) for name in columns[start : start + AT_A_TIME]]
            line.append(dot_products(left, right))
        blocks.append(torch.cat(line, dim=1))
    distances = 1 - torch.cat(blocks)
    return torch.where(distances < ROUNDING, 0.0, distances)


def _directions(adapter: Adapter) -> dict[str, Tensor]:
    """B of each module as a unit vector over sqrt(modules), beside a mark of those that are 0."""
    ups = {name: tensor.double() for name, tensor in adapter.items() if name.endswith(UP)}
    share = 1 / math.sqrt(len(ups))
    lengths = {name: float(tensor.norm()) for name, tensor in ups.items()}
    found = {
        name: tensor * (share / lengths[name] if lengths[name] else 0.0)
        for name, tensor in ups.items()
    }
    marks = [share if length == 0 else 0.0 for length in lengths.values()]
    return {**found, "zero": torch.tensor(marks, dtype=torch.float64)}
