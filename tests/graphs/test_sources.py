"""Graphs round by round: fixed ones stay, learned ones follow the updates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmira.config import GraphSettings
from fedmira.errors import ConfigError
from fedmira.graphs import (
    ExactProducts,
    FixedGraph,
    Graph,
    LearnedGraph,
    SketchedProducts,
    graph_source,
    random_graph,
    write_graph,
)
from fedmira.graphs.edges import blended

CLIENTS = ("a", "b", "c", "d", "e")
CATEGORIES = dict(zip(CLIENTS, "xxyyy", strict=True))


def some_products(seed: int) -> ExactProducts:
    """Two related clients and three others."""
    vectors = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors[1] += 2 * vectors[0]
    return ExactProducts(vectors @ vectors.T)


@pytest.mark.parametrize("kind", ["random", "uniform", "category"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_fixed_kinds_act_from_round_one_and_never_change(kind: str, shuffle: bool) -> None:
    source = graph_source(GraphSettings(kind=kind, shuffled=shuffle), CLIENTS, CATEGORIES, seed=1)
    memory = source.initial(CLIENTS)
    assert not source.learned
    assert source.acts(1)
    assert torch.equal(
        source.update(memory, some_products(0), torch.ones(5, dtype=torch.bool)).memory, memory
    )
    assert source.graph(memory, CLIENTS).kind == (f"{kind}-shuffled" if shuffle else kind)


def test_file_kind_reads_the_file(tmp_path: Path) -> None:
    graph = random_graph(CLIENTS, 3)
    write_graph(tmp_path / "graph.json", graph)
    source = graph_source(
        GraphSettings(kind="file", path=str(tmp_path / "graph.json")), CLIENTS, {}, seed=0
    )
    assert torch.equal(source.graph(source.initial(CLIENTS), CLIENTS).edge_list, graph.edge_list)


def given_to(graph: Graph, clients: tuple[str, ...]) -> Graph:
    source = FixedGraph(graph)
    return source.graph(source.initial(clients), clients)


def test_fixed_graph_follows_the_order_of_the_clients() -> None:
    graph = random_graph(CLIENTS, 3)
    assert torch.equal(given_to(graph, CLIENTS[::-1]).matrix(), graph.matrix().flip(0, 1))


def test_fixed_graph_of_other_clients_is_an_error_that_names_one() -> None:
    with pytest.raises(ConfigError, match="'z' is in only one"):
        given_to(random_graph(CLIENTS, 3), ("a", "b", "c", "d", "e", "z"))


def test_learned_graph_warms_up_while_it_learns() -> None:
    source = graph_source(
        GraphSettings(kind="similarity", warmup_rounds=2, nearest=2), CLIENTS, {}, seed=0
    )
    assert source.learned
    assert [source.acts(round_number) for round_number in (1, 2, 3)] == [False, False, True]
    trained = torch.ones(5, dtype=torch.bool)
    first = source.update(source.initial(CLIENTS), some_products(0), trained).memory
    assert torch.equal(first, some_products(0).likeness(trained, 2).edges)
    second = source.update(first, some_products(1), trained).memory
    assert torch.equal(second, blended(first, some_products(1).likeness(trained, 2).edges, 0.5, 5))


def test_shuffled_learned_graph_remembers_the_true_one() -> None:
    true, control = LearnedGraph(), LearnedGraph(shuffle_seed=4)
    trained = torch.ones(5, dtype=torch.bool)
    memory = true.update(true.initial(CLIENTS), some_products(0), trained).memory
    again = control.update(control.initial(CLIENTS), some_products(0), trained)
    assert torch.equal(again.memory, memory)
    shuffled = control.graph(memory, CLIENTS)
    assert shuffled.kind == "similarity-shuffled"
    assert not torch.equal(shuffled.edge_list, true.graph(memory, CLIENTS).edge_list)
    assert torch.equal(shuffled.edge_weights.sort().values, memory[:, 2].sort().values)
    assert torch.equal(shuffled.edge_list, control.graph(memory, CLIENTS).edge_list)


@pytest.mark.parametrize(
    ("sketch", "count", "entries"),
    [("auto", 512, 0), ("auto", 513, 1024), (0, 513, 0), (64, 5, 64)],
    ids=["few", "many", "never", "always"],
)
@pytest.mark.parametrize("kind", ["similarity", "category"])
def test_sketches_are_used_above_512_clients_or_as_asked(
    kind: str, sketch: int | str, count: int, entries: int
) -> None:
    clients = [f"client-{k}" for k in range(count)]
    categories = dict.fromkeys(clients, "x")
    assert (
        graph_source(GraphSettings(kind=kind, sketch=sketch), clients, categories, seed=0).sketch
        == entries
    )


def test_tiny_remembered_weights_are_forgotten_only_where_updates_are_sketched() -> None:
    """Two pairs of twins that part.

    After r more rounds the old edge is 0.5^r of what it was, below a millionth from r = 20 on.
    """
    vectors = torch.eye(4, 8)[[0, 0, 1, 1]]
    parted = torch.eye(4, 8)[[0, 2, 1, 1]]
    trained = torch.ones(4, dtype=torch.bool)
    exact, sketched = LearnedGraph(nearest=1), LearnedGraph(nearest=1, sketch=8)
    memories = [exact.initial(CLIENTS[:4]), sketched.initial(CLIENTS[:4])]
    for vector in [vectors, *[parted] * 22]:
        gram = vector.double() @ vector.double().T
        memories = [
            exact.update(memories[0], ExactProducts(gram), trained).memory,
            sketched.update(memories[1], SketchedProducts(vector), trained).memory,
        ]
    pairs = [[tuple(pair) for pair in memory[:, :2].int().tolist()] for memory in memories]
    assert pairs == [[(0, 1), (2, 3)], [(2, 3)]]


def related(kind: str, clients: Sequence[str], **more: Any) -> set[tuple[str, str, float]]:
    settings = {"path": more.pop("path")} if "path" in more else {}
    source = graph_source(GraphSettings(kind=kind, **settings), clients, {}, 7, **more)
    return set(source.graph(source.initial(clients), clients).edges())


def test_a_random_graph_keeps_its_edges_when_a_client_comes_who_has_none() -> None:
    few, many = ("a", "b", "c", "d", "e"), ("a", "b", "c", "d", "e", "x")
    before = related("random", few)
    assert before and related("random", many, newcomers=1) == before
    # Drawn anew for six, it would be another graph among the five.
    assert {edge for edge in related("random", many) if "x" not in edge[:2]} != before


def test_in_a_uniform_graph_a_newcomer_is_related_to_all() -> None:
    edges = related("uniform", ("a", "b", "x"), newcomers=1)
    assert edges == {("a", "b", 1.0), ("a", "x", 1.0), ("b", "x", 1.0)}


def test_a_graph_file_may_list_those_who_are_expected_and_their_edges_wait(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    edges = [("a", "b", 1.0), ("a", "x", 2.0)]
    listed = [{"source": s, "target": t, "weight": w} for s, t, w in edges]
    path.write_text(json.dumps({"clients": ["a", "b", "x"], "edges": listed}), encoding="utf-8")
    assert related("file", ("a", "b"), path=str(path), expected=("x", "y")) == {("a", "b", 1.0)}
    come = related("file", ("a", "b", "x"), path=str(path), newcomers=1, expected=("x", "y"))
    assert come == {("a", "b", 1.0), ("a", "x", 2.0)}
    # One that the file does not know has no edge, and a founder that it does not know is an error.
    come = related("file", ("a", "b", "y"), path=str(path), newcomers=1, expected=("x", "y"))
    assert come == {("a", "b", 1.0)}
    with pytest.raises(ConfigError, match="unknown client 'x'"):
        related("file", ("a", "b"), path=str(path))
    with pytest.raises(ConfigError, match="missing client 'c'"):
        related("file", ("a", "b", "c"), path=str(path), expected=("x",))


def test_what_is_kept_of_adapters_has_one_form_however_many_come() -> None:
    clients = [f"c{k}" for k in range(514)]
    settings = GraphSettings(kind="similarity")
    assert graph_source(settings, clients, {}, 0).sketch == 1024
    assert graph_source(settings, clients, {}, 0, newcomers=2).sketch == 0
