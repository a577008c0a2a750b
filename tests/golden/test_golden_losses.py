"""Losses of small runs stay what they were; `regenerate.py` beside this file made them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

HERE = Path(__file__).parent
GOLDEN: dict[str, dict[str, dict[str, float]]] = json.loads(
    (HERE / "losses.json").read_text(encoding="utf-8")
)
SCRIPT = runpy.run_path(str(HERE / "regenerate.py"))


def test_the_file_holds_the_runs_of_the_script() -> None:
    assert set(GOLDEN) == set(SCRIPT["RUNS"])


@pytest.mark.parametrize("name", GOLDEN)
def test_losses_are_the_golden_ones(name: str) -> None:
    found = SCRIPT["losses"](name)
    for kind, golden in GOLDEN[name].items():
        assert found[kind] == pytest.approx(golden, abs=1e-4)


def test_every_algorithm_gives_losses_of_its_own() -> None:
    finals = [tuple(run["clients"].values()) for run in GOLDEN.values()]
    assert len(set(finals)) == len(finals)
