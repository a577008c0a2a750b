"""Fixed graphs: the authors' recipe, categories, files, and the shuffled control."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedmira.errors import ConfigError
from fedmira.graphs import (
    Graph,
    category_graph,
    file_graph,
    graph_of,
    graph_text,
    random_graph,
    shuffled,
    uniform_graph,
    write_graph,
)
from fedmira.graphs.builders import permutation_without_fixed_points

CLIENTS = ("a", "b", "c", "d")


def test_random_graph_has_the_mean_and_the_sparsity_of_the_authors_recipe() -> None:
    """The mean x of two U(0, 1) is triangular, so P(x < 1/4) = 2 * (1/4)^2 = 1/8.

    What is kept has the mean E[x; x >= 1/4] = 1/2 - 4/3 * (1/4)^3 = 23/48.
    """
    graph = random_graph([f"client-{k}" for k in range(200)], seed=3)
    pairs = graph.matrix()[torch.triu(torch.ones(200, 200, dtype=torch.bool), diagonal=1)]
    assert float((pairs == 0).double().mean()) == pytest.approx(1 / 8, abs=0.01)
    assert float(pairs.mean()) == pytest.approx(1 / 2 - 4 / 3 / 64, abs=0.01)
    assert float(pairs[pairs > 0].min()) >= 0.25
    assert float(pairs.max()) <= 1


def test_random_graph_depends_on_nothing_but_clients_and_seed() -> None:
    first = random_graph(CLIENTS, 1)
    torch.manual_seed(99)
    assert torch.equal(first.edge_list, random_graph(CLIENTS, 1).edge_list)
    assert not torch.equal(first.edge_list, random_graph(CLIENTS, 2).edge_list)


def test_uniform_graph_joins_everybody_alike() -> None:
    graph = uniform_graph(CLIENTS)
    assert graph.degrees.tolist() == [3, 3, 3, 3]


def test_category_graph_joins_clients_of_one_category() -> None:
    graph = category_graph(CLIENTS, {"a": "law", "b": "math", "c": "law", "d": "law"})
    assert graph.edges() == [("a", "c", 1.0), ("a", "d", 1.0), ("c", "d", 1.0)]


def test_category_graph_without_categories_says_who_lacks_one() -> None:
    with pytest.raises(
        ConfigError, match=r"2 of 4 clients have no category, such as 'b'.*graph\.kind"
    ):
        category_graph(CLIENTS, {"a": "law", "b": "", "c": "law"})


def test_graph_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    graph = random_graph(CLIENTS, 0)
    write_graph(tmp_path / "graph.json", graph, round=7)
    document = json.loads((tmp_path / "graph.json").read_text())
    assert document["round"] == 7
    assert document["kind"] == "random"
    assert len(document["edges"]) == len(graph.edges())
    read = file_graph(tmp_path / "graph.json", CLIENTS)
    assert torch.equal(read.edge_list, graph.edge_list)
    swapped = file_graph(tmp_path / "graph.json", CLIENTS[::-1])
    assert torch.equal(swapped.matrix(), graph.matrix().flip(0, 1))


def test_graph_file_problems_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    edges = [
        {"source": "a", "target": "b", "weight": 1},
        {"source": "b", "target": "a", "weight": 1},
        {"source": "a", "target": "x", "weight": 1},
        {"source": "a", "target": "c", "weight": -0.5},
        {"source": "c", "target": "c", "weight": 1},
        {"source": "a", "weight": 1},
        {"source": "b", "target": "c", "weight": "1"},
    ]
    path.write_text(json.dumps({"kind": "file", "clients": ["a", "b", "c", "x"], "edges": edges}))
    with pytest.raises(ConfigError) as caught:
        file_graph(path, CLIENTS)
    expected = [
        "unknown client 'x'",
        "missing client 'd'",
        "edge 2: joins",
        "edge 3: unknown client 'x'",
        "edge 4: weight is -0.5",
    ]
    expected += [
        "edge 5: client 'c' is joined to itself",
        "edge 6: must be an object",
        "edge 7: weight is '1'",
    ]
    assert len(caught.value.problems) == len(expected)
    for problem, part in zip(caught.value.problems, expected, strict=True):
        assert part in problem
        assert str(path) in problem


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"clients": []}', '{"clients": 3, "edges": []}', "\xff"]
)
def test_what_is_no_graph_document_is_a_config_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "graph.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="graph file"):
        file_graph(path, CLIENTS)


def test_a_graph_file_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        file_graph(tmp_path / "none.json", CLIENTS)


@pytest.mark.parametrize("count", [2, 3, 4, 17])
def test_shuffle_leaves_nobody_in_place(count: int) -> None:
    for seed in range(20):
        places = permutation_without_fixed_points(count, seed)
        assert sorted(places.tolist()) == list(range(count))
        assert not bool((places == torch.arange(count)).any())


def test_shuffle_of_one_client_keeps_it() -> None:
    assert permutation_without_fixed_points(1, 0).tolist() == [0]


def test_shuffled_graph_has_the_same_weights_between_other_clients() -> None:
    graph = random_graph([f"client-{k}" for k in range(12)], 5)
    control = shuffled(graph, 5)
    assert control.clients == graph.clients
    assert control.kind == "random-shuffled"
    assert torch.equal(control.edge_weights.sort().values, graph.edge_weights.sort().values)
    torch.testing.assert_close(
        control.degrees.sort().values, graph.degrees.sort().values, rtol=1e-12, atol=0
    )
    assert not torch.equal(control.edge_list, graph.edge_list)
    assert torch.equal(control.edge_list, shuffled(graph, 5).edge_list)


def test_document_lists_a_pair_once() -> None:
    text = graph_text(Graph.from_edges("mine", ("a", "b"), [("b", "a", 0.5)]), {"round": 2})
    assert json.loads(text) == {
        "kind": "mine",
        "round": 2,
        "clients": ["a", "b"],
        "edges": [{"source": "a", "target": "b", "weight": 0.5}],
    }


def test_text_comes_back_with_its_kind_and_clients() -> None:
    graph = random_graph(CLIENTS, 3)
    read = graph_of(graph_text(graph, {"round": 1}), "graph.json")
    assert (read.kind, read.clients) == (graph.kind, graph.clients)
    assert torch.equal(read.edge_list, graph.edge_list)


def test_shuffle_gives_each_client_the_weights_of_the_one_whose_place_it_takes() -> None:
    graph = random_graph(CLIENTS, 5)
    places = permutation_without_fixed_points(4, 5)
    assert torch.equal(shuffled(graph, 5).matrix(), graph.matrix()[places][:, places])


@pytest.mark.parametrize(
    "build", [uniform_graph, lambda clients: random_graph(clients, 0)], ids=["uniform", "random"]
)
def test_a_rule_that_relates_too_many_pairs_names_their_number_and_what_to_do(
    build: Callable[[list[str]], Graph],
) -> None:
    clients = [f"client-{k}" for k in range(10_000)]
    with pytest.raises(
        ConfigError,
        match=r"relates 49,995,000 pairs of 10,000 clients; at most 2,000,000 .*'similarity'",
    ):
        build(clients)


def test_categories_of_thousands_of_clients_are_counted_before_they_are_joined() -> None:
    """1,000 categories of 10 clients have 1,000 * 45 pairs.

    2 categories of 5,000 have 2 * 12,497,500.
    """
    clients = [f"client-{k}" for k in range(10_000)]
    graph = category_graph(clients, {client: str(k % 1000) for k, client in enumerate(clients)})
    assert len(graph.edge_list) == 45_000
    assert graph.degrees.tolist() == [9.0] * 10_000
    with pytest.raises(ConfigError, match="24,995,000 pairs"):
        category_graph(clients, {client: str(k % 2) for k, client in enumerate(clients)})
