"""The options of experiments/natural_instructions/tune_mira.py.

All go together, and pFedGraph's are run as in its paper.
"""

from __future__ import annotations

import importlib.util
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fedmira.config import load_config

FOLDER = Path(__file__).parents[2] / "experiments" / "natural_instructions"


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))  # the script imports its neighbour
    specification = importlib.util.spec_from_file_location("tune_mira", FOLDER / "tune_mira.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_pfedgraph_is_run_as_in_its_paper_whatever_else_was_chosen(tuning: ModuleType) -> None:
    default = {knob: next(iter(options)) for knob, options in tuning.KNOBS.items()}
    for graph, coupling, size in product(
        *(tuning.KNOBS[knob] for knob in ("graph", "coupling", "size"))
    ):
        chosen = tuning.settled({**default, "graph": graph, "coupling": coupling, "size": size})
        algorithm: Any = load_config(
            None, None, ["data.path=tasks", *tuning.COMMON, *tuning.overrides_of(chosen, chosen)]
        ).algorithm
        if graph.startswith("pfedgraph"):
            assert (algorithm.server_step, algorithm.size_scale, tuning.name_of(chosen)) == (
                1,
                0,
                graph,
            )
        else:
            assert algorithm.server_step is None and (chosen["coupling"], chosen["size"]) == (
                coupling,
                size,
            )


def test_a_knob_that_the_graph_settles_is_not_tried(
    tuning: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[list[str]] = []

    def losses_of(arguments: object, candidates: dict[str, dict[str, str]]) -> dict[str, float]:
        tried.append([tuning.name_of(chosen) for chosen in candidates.values()])
        preferred = ("pfedgraph-0.4", "coupling-0.5", "memory-0")
        return {option: 0.0 if option in preferred else 1.0 for option in candidates}

    monkeypatch.setattr(tuning, "measured", losses_of)
    assert (
        tuning.name_of(tuning.tuned(None, ["graph", "coupling", "size", "memory"]))
        == "pfedgraph-0.4_memory-0"
    )
    assert [len(names) for names in tried] == [10, 3]
    assert tuning.name_of(tuning.tuned(None, ["coupling", "graph"])) == "pfedgraph-0.4"
    assert "nearest-5_coupling-0.5" in tried[-1] and "pfedgraph-0.8" in tried[-1]


def test_capacity_that_was_chosen_is_given_to_all_methods_of_the_final_table(
    tuning: ModuleType,
) -> None:
    default = {knob: next(iter(options)) for knob, options in tuning.KNOBS.items()}
    chosen = {
        **default,
        "rank": "rank-32",
        "layers": "layers-qkvo",
        "steps": "steps-3",
        "graph": "nearest-5",
    }
    arguments = SimpleNamespace(tasks="tasks", extra=[])
    ground = tuning.ground_of(arguments, chosen, tuning.CAPACITY)
    assert (
        ground.adapter.rank,
        len(ground.adapter.targets),
        ground.local.steps,
        ground.rounds.count,
    ) == (32, 4, 3, 10)
    assert (
        ground.graph.nearest
        == load_config(None, None, ["data.path=tasks", *tuning.COMMON]).graph.nearest
    )
