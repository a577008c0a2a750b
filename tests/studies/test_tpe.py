"""Trials that Optuna proposes; most tests need it installed."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedmira.config import Config
from fedmira.errors import ConfigError
from fedmira.model import BaseModel
from fedmira.observers import Observer, RoundEvent
from fedmira.studies import Search, tune_settings
from small import make_config

INSTALLED = importlib.util.find_spec("optuna") is not None
needs_optuna = pytest.mark.skipif(
    not INSTALLED, reason="needs Optuna, which is optional and not installed"
)
SPACE: dict[str, Any] = {
    "local.learning_rate": {"low": 0.001, "high": 0.1, "log": True},
    "algorithm.coupling": [0.3, 0.6, 1.0],
    "local.steps": {"low": 1, "high": 3},
    "local.optimizer": ["adamw", "sgd"],
}
SEARCH = Search(method="tpe", trials=7, seeds=(5,))


class PowerCut(BaseException):
    """Raised in the middle of a run."""


class Watch(Observer):
    def __init__(self, cut: tuple[str, int] = ("", 0)) -> None:
        self.rounds: list[tuple[str, int]] = []
        self.cut = cut

    def on_round(self, event: RoundEvent) -> None:
        self.rounds.append((event.run.name, event.round))
        if self.rounds[-1] == self.cut:
            raise PowerCut


@pytest.fixture(scope="module")
def config(base_folder: Path, clients_folder: Path) -> Config:
    settings = {"graph.kind": "category", "rounds.count": 2}
    return make_config(base_folder, clients_folder, settings)


@pytest.mark.skipif(INSTALLED, reason="Optuna is installed")
def test_without_optuna_the_way_to_it_is_said(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'fedmira\[tune\]'.*--method halving"):
        tune_settings(config, SPACE, SEARCH, tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


@needs_optuna
def test_a_search_that_was_cut_off_proposes_what_it_would_have(
    config: Config, base: BaseModel, tmp_path: Path
) -> None:
    whole = tune_settings(config, SPACE, SEARCH, tmp_path / "whole", base=base)
    trials = whole.document["trials"]
    assert trials[0]["values"] == {
        "algorithm.coupling": 1.0,
        "local.learning_rate": 0.02,
        "local.optimizer": "adamw",
        "local.steps": 2,
    }, "the config's own settings come first"
    assert (whole.folder / "optuna.sqlite3").is_file()
    with pytest.raises(PowerCut):
        cut = Watch(("006-seed5", 1))
        tune_settings(config, SPACE, SEARCH, tmp_path / "cut", [cut], base=base)
    watch = Watch()
    again = tune_settings(config, SPACE, SEARCH, tmp_path / "cut", [watch], base=base)
    assert watch.rounds == [("006-seed5", 2), ("007-seed5", 1), ("007-seed5", 2)]
    assert again.rows == whole.rows
    more = Watch()
    longer = replace(SEARCH, trials=8)
    tune_settings(config, SPACE, longer, tmp_path / "cut", [more], base=base)
    assert more.rounds == [("008-seed5", 1), ("008-seed5", 2)]
