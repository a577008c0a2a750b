"""The examples in docstrings are run as they stand; those that train have three tiny clients."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

FIRST = "fedmira.api.run"
"""Its example makes the run folder that other examples load."""

WITH_A_RUN = (
    "fedmira.api.check",
    "fedmira.api.compare",
    "fedmira.api.join",
    "fedmira.api.load",
    "fedmira.api.tune",
    "fedmira.api.fleets.align",
    "fedmira.api.fleets.compress",
    "fedmira.api.fleets.merge",
    "fedmira.studies.result.Result.generate",
    "fedmira.studies.result.Result.merge",
    "fedmira.studies.result.Result.plot",
)
ALONE = (
    "fedmira.adapters.arithmetic.weighted_sum",
    "fedmira.adapters.low_rank.mix",
    "fedmira.adapters.low_rank.scale",
    "fedmira.adapters.mappings.replaced",
    "fedmira.adapters.merging.metagpt_weights",
    "fedmira.config.load.load_config",
    "fedmira.config.section.setting",
    "fedmira.graphs.graph.Graph.from_edges",
    "fedmira.messages.Payload",
    "fedmira.messages.Reply",
    "fedmira.methods.base.Combined",
    "fedmira.methods.base.Method",
    "fedmira.methods.base.ServerState",
    "fedmira.metrics.summary.summarise",
    "fedmira.metrics.texts.exact_match",
    "fedmira.metrics.texts.rouge_l",
    "fedmira.metrics.token_loss.TokenLoss",
    "fedmira.observers.base.Observer",
    "fedmira.observers.base.Stop",
    "fedmira.observers.early_stopping.EarlyStopping",
    "fedmira.studies.tuning.halving.stage_rounds",
    "fedmira.studies.tuning.halving.stage_sizes",
)


def run_example(place: str) -> None:
    """Runs the example of a dotted name, with nothing but its own imports."""
    module_name, parts = place, []
    while True:
        try:
            found: object = import_module(module_name)
            break
        except ModuleNotFoundError:
            module_name, _, part = module_name.rpartition(".")
            parts.insert(0, part)
    for part in parts:
        found = getattr(found, part)
    text = found.__doc__ or ""
    test = doctest.DocTestParser().get_doctest(text, {}, place, place, 0)
    assert test.examples, f"{place} has no example"
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which runs/first lies."""
    made = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        run_example(FIRST)
    return made


@pytest.fixture
def within(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Relative paths begin there."""
    monkeypatch.chdir(folder)
    yield


@pytest.mark.usefixtures("within")
@pytest.mark.parametrize("place", WITH_A_RUN)
def test_example_on_a_run(place: str) -> None:
    run_example(place)


@pytest.mark.parametrize("place", ALONE)
def test_example(place: str) -> None:
    run_example(place)
