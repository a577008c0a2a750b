"""The recipes in CONTRIBUTING.md are followed as they are written."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fedmira.config.methods as methods
import fedmira.config.sources as sources
from fedmira.config import GraphSettings, load_config
from fedmira.data import load_clients
from fedmira.experiment import build_experiment, run_experiment
from fedmira.graphs import graph_source
from fedmira.graphs import sources as graph_kinds
from fedmira.model import BaseModel, load_base
from small import adapter_bytes, make_config, table_of

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], ModuleType]]:
    """Heading -> the file below it, as an imported module called `recipe`."""

    def imported(heading: str) -> ModuleType:
        section = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
        found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
        assert found is not None
        (tmp_path / "recipe.py").write_text(found[1], encoding="utf-8")
        return import_module("recipe")

    monkeypatch.syspath_prepend(tmp_path)
    yield imported
    sys.modules.pop("recipe", None)


def test_a_method_is_a_file_and_a_line(
    recipe: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
) -> None:
    recipe("A new method")
    monkeypatch.setitem(methods.METHODS, "half-way", "recipe:HalfWay")  # type: ignore[arg-type]
    adapters = []
    for pull in (0.0, 0.5):
        settings = {"algorithm.name": "half-way", "algorithm.pull": pull}
        config = make_config(base_folder, clients_folder, settings)
        folder = tmp_path / str(pull)
        run_experiment(build_experiment(config, base), folder)
        adapters.append(adapter_bytes(folder, cards=False))
    alone = make_config(base_folder, clients_folder, {"algorithm.name": "local"})
    run_experiment(build_experiment(alone, base), tmp_path / "alone")
    assert adapters[0] == adapter_bytes(tmp_path / "alone", cards=False), (
        "no pull is local training"
    )
    assert adapters[1] != adapters[0]


def test_a_source_is_a_file_and_a_line(
    recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe("A new source of rows")
    monkeypatch.setitem(sources.SOURCES, "sums", "recipe:read")  # type: ignore[arg-type]
    config = load_config(overrides=["data.source=sums"])
    clients = load_clients(config.data, config.seed, load_base(config.model).tokenizer).clients
    assert [client.client_id for client in clients] == ["plus-0", "plus-1", "plus-2"]


def test_a_fixed_graph_is_a_function_and_a_line(
    recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = recipe("A new graph").ring_graph
    monkeypatch.setitem(graph_kinds._FIXED, "ring", lambda settings, of, seed: ring(of.clients))  # type: ignore[arg-type]
    clients = ("a", "b", "c", "d")
    source = graph_source(GraphSettings.model_construct(kind="ring"), clients, {}, seed=0)
    graph = source.graph(source.initial(clients), clients)
    assert torch.equal(graph.degrees, torch.full((4,), 2.0, dtype=torch.float64))


def test_a_tracker_is_a_file(
    recipe: Callable[[str], ModuleType],
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
) -> None:
    lines = recipe("A new tracker").Lines(tmp_path / "rounds.jsonl")
    config = make_config(base_folder, clients_folder, {"algorithm.name": "local"})
    run_experiment(build_experiment(config, base), tmp_path / "run", [lines])
    written = [json.loads(line) for line in lines.path.read_text(encoding="utf-8").splitlines()]
    rows = table_of(tmp_path / "run", "rounds")
    assert [line["round"] for line in written] == list(range(1, config.rounds.count + 1))
    assert [line["train_loss"] for line in written] == [float(row["train_loss"]) for row in rows]
    assert {line["run"] for line in written} == {"run"}
