"""Graphs round by round: fixed ones stay, learned ones follow the updates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedmira.config.schema import GraphSettings
from fedmira.errors import ConfigError
from fedmira.graphs import FixedGraph, LearnedGraph, graph_source, random_graph, similarity_weights, write_graph

CLIENTS = ("a", "b", "c", "d", "e")
CATEGORIES = dict(zip(CLIENTS, "xxyyy", strict=True))


def some_gram(seed: int) -> torch.Tensor:
    vectors = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vectors @ vectors.T


@pytest.mark.parametrize("kind", ["random", "uniform", "category"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_fixed_kinds_act_from_round_one_and_never_change(kind: str, shuffle: bool) -> None:
    source = graph_source(GraphSettings(kind=kind, shuffled=shuffle), CLIENTS, CATEGORIES, seed=1)
    memory = source.initial(CLIENTS)
    assert not source.learned
    assert source.acts(1)
    assert torch.equal(source.update(memory, some_gram(0), torch.ones(5, dtype=torch.bool)), memory)
    assert source.graph(memory, CLIENTS).kind == (f"{kind}-shuffled" if shuffle else kind)


def test_file_kind_reads_the_file(tmp_path: Path) -> None:
    graph = random_graph(CLIENTS, 3)
    write_graph(tmp_path / "graph.json", graph)
    source = graph_source(GraphSettings(kind="file", path=str(tmp_path / "graph.json")), CLIENTS, {}, seed=0)
    assert torch.equal(source.initial(CLIENTS), graph.weights)


def test_fixed_graph_follows_the_order_of_the_clients() -> None:
    graph = random_graph(CLIENTS, 3)
    assert torch.equal(FixedGraph(graph).initial(CLIENTS[::-1]), graph.weights.flip(0, 1))


def test_fixed_graph_of_other_clients_is_an_error_that_names_one() -> None:
    with pytest.raises(ConfigError, match="'z' is in only one"):
        FixedGraph(random_graph(CLIENTS, 3)).initial(("a", "b", "c", "d", "e", "z"))


def test_learned_graph_warms_up_while_it_learns() -> None:
    source = graph_source(GraphSettings(kind="similarity", warmup_rounds=2, nearest=2), CLIENTS, {}, seed=0)
    assert source.learned
    assert [source.acts(round_number) for round_number in (1, 2, 3)] == [False, False, True]
    trained = torch.ones(5, dtype=torch.bool)
    first = source.update(source.initial(CLIENTS), some_gram(0), trained)
    assert torch.equal(first, similarity_weights(some_gram(0), trained, 2))
    second = source.update(first, some_gram(1), trained)
    torch.testing.assert_close(second, 0.5 * first + 0.5 * similarity_weights(some_gram(1), trained, 2))


def test_shuffled_learned_graph_remembers_the_true_one() -> None:
    true, control = LearnedGraph(), LearnedGraph(shuffle_seed=4)
    trained = torch.ones(5, dtype=torch.bool)
    memory = true.update(true.initial(CLIENTS), some_gram(0), trained)
    assert torch.equal(control.update(control.initial(CLIENTS), some_gram(0), trained), memory)
    shuffled = control.graph(memory, CLIENTS)
    assert shuffled.kind == "similarity-shuffled"
    assert not torch.equal(shuffled.weights, true.graph(memory, CLIENTS).weights)
    assert torch.equal(shuffled.weights.flatten().sort().values, memory.flatten().sort().values)
    assert torch.equal(shuffled.weights, control.graph(memory, CLIENTS).weights)
