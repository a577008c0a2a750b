"""FedLEASE without router: planted groups are found, one cluster is FedAvg, late clients join."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedmira.adapters import Adapter, digest, weighted_sum
from fedmira.errors import ConfigError
from fedmira.graphs import LearnedGraph
from fedmira.methods import FedAvg, FedLease, Method, MethodContext, ServerState
from fedmira.methods.fedlease import average_linkage, chosen_clusters, silhouette
from lora_federation import context, lora, names, replies, started

GROUPS = (0, 1, 0, 2, 1, 2, 0, 1)
"""The planted group of each of 8 clients."""
ROWS = [10, 30, 20, 40, 10, 50, 20, 30]


def near(group: int, seed: int, noise: float = 0.3) -> dict[str, Tensor]:
    """A member of a group: its factors and noise; the groups' are far from each other."""
    return weighted_sum([lora(2, 500 + group), lora(2, seed)], [1.0, noise])


def among(*places: float) -> Tensor:
    """Distances of places on a line."""
    line = torch.tensor(places, dtype=torch.float64)
    return (line[:, None] - line).abs()


def round_of(
    algorithm: Method, state: ServerState, adapters: Mapping[str, Adapter], number: int
) -> tuple[ServerState, Mapping[str, float]]:
    """The state after a round in which these adapters are sent, and what is said of it."""
    combined = algorithm.combine(state, replies(algorithm.context, adapters, number))
    return combined.state, combined.diagnostics.round


def same_groups(clusters: Sequence[int], groups: Sequence[int]) -> bool:
    """Whether both divide the clients alike, whatever the numbers."""
    pairs = set(zip(clusters, groups, strict=True))
    return len(pairs) == len({c for c, _ in pairs}) == len({g for _, g in pairs})


def test_average_linkage_joins_the_nearest_by_mean_distance() -> None:
    """Places 0, 1, 5, 7.5: 0 and 1, then 5 and 7.5, since 4.5 to the pair is farther than 2.5."""
    found = average_linkage(among(0, 1, 5, 7.5), 4)
    assert {count: labels.tolist() for count, labels in found.items()} == {
        4: [0, 1, 2, 3],
        3: [0, 0, 1, 2],
        2: [0, 0, 1, 1],
        1: [0, 0, 0, 0],
    }
    # 5 is 3 from 2, but 4 from {0, 1, 2} on average: what is nearer to it than 4 gets it.
    assert average_linkage(among(0, 1, 2, 5, 9.1), 2)[2].tolist() == [0, 0, 0, 0, 1]
    assert average_linkage(among(0, 1, 2, 5, 8.9), 2)[2].tolist() == [0, 0, 0, 1, 1]


def test_silhouette_by_hand() -> None:
    """Places 0, 1 and 5: (5 - 1) / 5 and (4 - 1) / 4, and 0 for who is alone."""
    found = silhouette(among(0, 1, 5), torch.tensor([0, 0, 1]))
    assert found == pytest.approx((4 / 5 + 3 / 4 + 0) / 3)
    equal = torch.zeros(3, 3, dtype=torch.float64)
    assert silhouette(equal, torch.tensor([0, 0, 1])) == 0


def test_clients_that_are_alike_or_equally_far_are_one_cluster() -> None:
    for distances in (torch.zeros(5, 5), 1 - torch.eye(5)):
        labels, width = chosen_clusters(distances.double(), 4)
        assert (labels.tolist(), width) == ([0] * 5, 0.0)


def test_planted_groups_are_found_and_each_gets_the_mean_of_its_members() -> None:
    federation = context([2] * 8, ROWS)
    algorithm = FedLease().for_federation(federation)
    state = started(algorithm, federation)
    adapters = {c: near(GROUPS[k], 10 + k) for k, c in enumerate(names(8))}
    after, figures = round_of(algorithm, state, adapters, 1)
    clusters = after.numbers["cluster"].tolist()
    assert same_groups(clusters, GROUPS)
    assert figures["clusters"] == 3 and figures["without_cluster"] == 0
    assert 0 < figures["silhouette"] < 1
    for number in (1, 2):
        for group in range(3):
            inside = [k for k in range(8) if GROUPS[k] == group]
            total = sum(ROWS[k] for k in inside)
            mean = weighted_sum(
                [adapters[f"client-{k}"] for k in inside], [ROWS[k] / total for k in inside]
            )
            for k in inside:
                given = algorithm.adapter_for(after, f"client-{k}")
                assert digest(given) == digest(mean)
                assert given is algorithm.instruct(after, f"client-{k}").tensors["adapter"]
        adapters = {c: near(GROUPS[k], 30 + k) for k, c in enumerate(names(8))}
        after, _ = round_of(algorithm, after, adapters, number + 1)
        assert after.numbers["cluster"].tolist() == clusters, "clusters are made once"


def test_only_b_is_compared_whatever_its_length() -> None:
    """Groups in A alone are none, and B is compared by its direction in each module."""
    federation = context([2] * 6)
    algorithm, common = FedLease().for_federation(federation), lora(2, 3)
    adapters = {
        c: {n: t * (1 + k) if ".lora_B." in n else near(k % 2, 9)[n] for n, t in common.items()}
        for k, c in enumerate(names(6))
    }
    after, figures = round_of(algorithm, started(algorithm, federation), adapters, 1)
    assert after.numbers["cluster"].tolist() == [0] * 6 and figures["silhouette"] == 0


def test_clients_whose_b_is_zero_are_alike_and_far_from_the_others() -> None:
    federation = context([2] * 6)
    algorithm = FedLease().for_federation(federation)
    state = started(algorithm, federation)
    adapters = {c: state.adapters[c] if k % 2 else near(0, 10 + k) for k, c in enumerate(names(6))}
    after, _ = round_of(algorithm, state, adapters, 1)
    assert after.numbers["cluster"].tolist() == [0, 1] * 3


def test_everybody_in_one_cluster_is_fedavg_bit_for_bit() -> None:
    federation, ends = context([2] * 8, ROWS), []
    for settings in (FedLease(most_clusters=1), FedAvg()):
        algorithm = settings.for_federation(federation)
        state = started(algorithm, federation)
        for number, present in ((1, names(8)), (2, names(8)[2:5]), (3, names(8)[4:])):
            sent = {
                c: weighted_sum(
                    [algorithm.adapter_for(state, c), lora(2, 9 * number + k)], [1.0, 0.1]
                )
                for k, c in enumerate(present)
            }
            state, _ = round_of(algorithm, state, sent, number)
        ends.append([digest(algorithm.adapter_for(state, c)) for c in names(8)])
    assert ends[0] == ends[1]


def test_in_the_warm_up_everybody_is_alone() -> None:
    """Of 4 rounds 0.5 are 2: nothing is averaged before the end of the second."""
    federation = context([2] * 8, ROWS)
    algorithm = FedLease(warmup_share=0.5).for_federation(federation)
    state = started(algorithm, federation)
    adapters = {c: near(GROUPS[k], 10 + k) for k, c in enumerate(names(8)[:4])}
    state, figures = round_of(algorithm, state, adapters, 1)
    assert figures["clusters"] == 0 and figures["without_cluster"] == 8
    for client in names(8):
        expected = adapters.get(client, started(algorithm, federation).adapters[client])
        assert digest(algorithm.adapter_for(state, client)) == digest(expected)
    later = {c: near(GROUPS[k], 10 + k) for k, c in enumerate(names(8)) if k >= 4}
    state, figures = round_of(algorithm, state, later, 2)
    assert same_groups(state.numbers["cluster"].tolist(), GROUPS) and figures["clusters"] == 3


def test_who_comes_after_the_warm_up_joins_the_nearest_cluster_and_counts_from_then_on() -> None:
    federation = context([2] * 8, ROWS)
    algorithm = FedLease().for_federation(federation)
    first = {c: near(GROUPS[k], 10 + k) for k, c in enumerate(names(8)) if k != 7}
    state, figures = round_of(algorithm, started(algorithm, federation), first, 1)
    assert figures["without_cluster"] == 1
    begun = algorithm.instruct(state, "client-7").tensors["adapter"]
    assert digest(begun) == digest(started(algorithm, federation).adapters["client-7"])
    together = {"client-4": near(1, 40), "client-7": near(1, 41)}
    after, figures = round_of(algorithm, state, together, 2)
    assert figures["without_cluster"] == 0 and "silhouette" not in figures
    assert same_groups(after.numbers["cluster"].tolist(), GROUPS)
    for client in ("client-1", "client-7"):
        assert digest(algorithm.adapter_for(after, client)) == digest(together["client-4"])
    alone, _ = round_of(algorithm, after, {"client-7": near(1, 50)}, 3)
    assert digest(algorithm.adapter_for(alone, "client-1")) == digest(near(1, 50))


@pytest.mark.parametrize(
    ("federation", "words"),
    [
        (context([2, 3, 2]), "client 'client-0' has rank 2 and client 'client-1' rank 3"),
        (context([2] * 4, rounds=1), "rounds.count is 1; needs at least 2"),
        (replace(context([2] * 9), cohort=2), "at most 2 of 9 clients train in the warm-up of 1"),
        (context([2] * 2), "at most 2 of 2 clients train in the warm-up"),
        (
            context([2] * 2001, graph=LearnedGraph()),
            "2,001,000 pairs of 2,001 clients; at most 2,000,000",
        ),
    ],
    ids=["ranks", "one round", "a small warm-up", "two clients", "many clients"],
)
def test_federations_without_clusters_are_refused(federation: MethodContext, words: str) -> None:
    with pytest.raises(ConfigError, match=f"fedlease: .*{words}"):
        FedLease().for_federation(federation)
