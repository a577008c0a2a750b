"""MIRA with sketches in place of inner products.

The mixing stays exact, few adapters are read, and the graph is found all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmira.adapters import (
    Adapter,
    HashedAdapter,
    digest,
    factor_sketches,
    product_sketches,
    scale,
)
from fedmira.config import GraphSettings
from fedmira.graphs import (
    FixedGraph,
    GraphSource,
    LearnedGraph,
    category_graph,
    graph_source,
    random_graph,
    uniform_graph,
)
from fedmira.messages import Payload, Reply
from fedmira.methods import Method, MethodContext, Mira, ServerState
from fedmira.storage import AdapterStore, AdapterTable

ALPHA, RANK = 16.0, 4
SPACES = ("factor", "product")


def names(count: int) -> tuple[str, ...]:
    return tuple(f"client-{k}" for k in range(count))


def lora(seed: int, rank: int = RANK) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for module, out in (("q", 14), ("v", 10)):
        adapter[f"m.{module}.lora_A.weight"] = torch.randn(rank, 12, generator=generator)
        adapter[f"m.{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    return adapter


def clustered(k: int, groups: int, seed: int = 0) -> dict[str, Tensor]:
    """The update of the client's group, a part that all groups share, and noise of its own.

    A is the common start.
    """
    shared, group, noise = lora(1), lora(10 + k % groups), lora(1000 * (seed + 1) + k)
    return {
        name: tensor if ".lora_A." in name else shared[name] + 1.5 * group[name] + 0.5 * noise[name]
        for name, tensor in lora(0).items()
    }


def federation(graph: GraphSource, count: int, cohort: int | None = None) -> MethodContext:
    clients = names(count)
    return MethodContext(
        clients,
        dict.fromkeys(clients, 64),
        dict.fromkeys(clients, RANK),
        ALPHA,
        graph,
        cohort or count,
    )


def mira(graph: GraphSource, count: int, **chosen: Any) -> Method:
    return Mira(**{"size_scale": 0.0, **chosen}).for_federation(federation(graph, count))


def start(algorithm: Method, count: int) -> ServerState:
    idle = {
        name: torch.zeros_like(tensor) if ".lora_B." in name else tensor
        for name, tensor in lora(0).items()
    }
    return algorithm.initial_state(dict.fromkeys(names(count), idle))


def replies_of(adapters: Mapping[int, Adapter], round_number: int) -> list[Reply]:
    return [
        Reply(f"client-{k}", round_number, 64, Payload({"adapter": adapter}))
        for k, adapter in sorted(adapters.items())
    ]


class WatchedStore(AdapterStore):
    """A store that notes which adapters are read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read: list[str] = []

    def get(self, key: str) -> HashedAdapter:
        self.read.append(key)
        return super().get(key)


def test_the_graph_learned_from_sketches_is_the_exact_one_where_updates_are_clustered() -> None:
    """Both join clients of the same group only.

    With as many neighbours as relatives they choose the same, with nearly the same weights.
    """
    count, groups = 24, 6
    everybody = {k: clustered(k, groups) for k in range(count)}
    found = []
    for sketch in (0, 1024):
        algorithm = mira(
            LearnedGraph(nearest=count // groups - 1, warmup_rounds=0, sketch=sketch), count
        )
        graph = algorithm.combine(
            start(algorithm, count), replies_of(everybody, 1)
        ).diagnostics.graph
        assert graph is not None
        found.append(graph)
    exact, sketched = found
    assert all((i - j) % groups == 0 for i, j in exact.pairs.tolist())
    assert torch.equal(exact.pairs, sketched.pairs)
    torch.testing.assert_close(sketched.edge_weights, exact.edge_weights, rtol=0, atol=0.05)


@pytest.mark.parametrize("space", SPACES)
def test_on_a_fixed_graph_sketches_change_nothing_but_the_logged_disagreement(space: str) -> None:
    count = 8
    graph = random_graph(names(count), 0)
    states, logs = [], []
    for sketch in (0, 2048):
        algorithm = mira(FixedGraph(graph, sketch), count, coupling=0.7, space=space)
        state = start(algorithm, count)
        for number, cohort in enumerate([range(8), (1, 4, 6), (0, 1, 7)], start=1):
            combined = algorithm.combine(
                state, replies_of({k: clustered(k, 3, number) for k in cohort}, number)
            )
            state = combined.state
        states.append({client: digest(adapter) for client, adapter in state.adapters.items()})
        logs.append(combined.diagnostics)
    assert states[0] == states[1]
    assert logs[0].clients == logs[1].clients
    assert logs[0].expects_motion == logs[1].expects_motion == {"client-0", "client-1", "client-7"}
    for moment in ("disagreement_before", "disagreement_after"):
        assert logs[1].round[moment] == pytest.approx(logs[0].round[moment], rel=0.1)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("learned", [False, True])
def test_a_round_reads_its_neighbours_and_no_other_adapter(
    space: str, learned: bool, tmp_path: Path
) -> None:
    """Client 2 of ten groups of three.

    Only 12 and 22 are related to it. With exact inner products, everybody is read.
    """
    count = 30
    fixed = category_graph(
        names(count), {client: str(k % 10) for k, client in enumerate(names(count))}
    )
    for sketch, expected in ((1024, {"client-12", "client-22"}), (0, set(names(count)))):
        source = (
            LearnedGraph(nearest=2, warmup_rounds=0, sketch=sketch)
            if learned
            else FixedGraph(fixed, sketch)
        )
        algorithm = mira(source, count, space=space, coupling=0.5)
        state = algorithm.combine(
            start(algorithm, count), replies_of({k: clustered(k, 10) for k in range(count)}, 1)
        ).state
        store = WatchedStore(tmp_path / str(sketch))
        table = AdapterTable.of(store, state.adapters)
        algorithm.combine(
            ServerState(table, state.numbers), replies_of({2: clustered(2, 10, 5)}, 2)
        )
        owner = {key: client for client, key in table.hashes.items()}
        assert {owner[key] for key in store.read} - {"client-2"} == expected - {"client-2"}


@pytest.mark.parametrize("space", SPACES)
def test_kept_sketches_equal_those_computed_at_once(space: str) -> None:
    count, entries = 6, 32
    algorithm = mira(
        LearnedGraph(warmup_rounds=0, nearest=2, sketch=entries), count, coupling=0.7, space=space
    )
    state = start(algorithm, count)
    for number, pair in enumerate([(0, 1), (2, 3), (4, 5), (1, 4)], start=1):
        state = algorithm.combine(
            state, replies_of({k: clustered(k, 2, number) for k in pair}, number)
        ).state
    adapters = [state.adapters[client] for client in names(count)]
    expected = product_sketches(adapters, [scale(ALPHA, RANK)] * count, entries)
    if space == "product":
        torch.testing.assert_close(state.numbers["product_sketch"], expected, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(
            state.numbers["factor_sketch"], factor_sketches(adapters, entries), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("space", SPACES)
def test_whether_a_client_must_move_is_exact(space: str) -> None:
    """One entry of one neighbour that differs by a thousandth counts; none does not.

    This is far below what four sketched numbers could tell.
    """
    algorithm = mira(FixedGraph(uniform_graph(names(3)), sketch=4), 3, coupling=0.5, space=space)
    same = lora(7)
    assert (
        algorithm.combine(
            start(algorithm, 3), replies_of(dict.fromkeys(range(3), same), 1)
        ).diagnostics.expects_motion
        == frozenset()
    )
    other = {name: tensor.clone() for name, tensor in same.items()}
    other["m.v.lora_B.weight"][0, 0] += 1e-3
    combined = algorithm.combine(start(algorithm, 3), replies_of({0: same, 1: same, 2: other}, 1))
    assert combined.diagnostics.expects_motion == set(names(3))


def test_the_state_of_thousands_of_clients_has_no_number_for_each_pair() -> None:
    """Twice 1,024 float32 a client, the round it last trained in, and its few edges.

    One sketch is of its adapter, the other of what its training has added.

    600 of 3,000 train, so more than one block of rows.
    """
    count = 3000
    algorithm = mira(graph_source(GraphSettings(warmup_rounds=0), names(count), {}, 0), count)
    combined = algorithm.combine(
        start(algorithm, count), replies_of({k: clustered(k, 150) for k in range(600)}, 1)
    )
    sizes = {
        name: tensor.numel() * tensor.element_size()
        for name, tensor in combined.state.numbers.items()
    }
    edges = combined.diagnostics.graph.edges() if combined.diagnostics.graph else []
    assert sizes == {
        "last_round": 8 * count,
        "product_sketch": 4 * 1024 * count,
        "travelled_sketch": 4 * 1024 * count,
        "graph": 24 * len(edges),
    }
    assert 600 * 3 / 2 <= len(edges) <= 600 * 3
    related = sum(
        (int(one.split("-")[1]) - int(other.split("-")[1])) % 150 == 0 for one, other, _ in edges
    )
    assert related == len(edges)
