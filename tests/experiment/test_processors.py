"""How many processes and threads a run gets where its settings leave that open."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fedmira.experiment.processors as processors
from fedmira.clients import Crew
from fedmira.experiment import build_experiment
from fedmira.experiment.processors import choose_crew, free_cores
from fedmira.model import BaseModel
from small import make_config

LONG = {"rounds.count": 10**7, "algorithm.name": "local"}


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four free cores, whatever this machine does, and a program that starts nothing when read."""
    monkeypatch.setattr(processors, "free_cores", lambda: 4)
    main = ModuleType("__main__")
    main.__file__ = None
    monkeypatch.setitem(sys.modules, "__main__", main)


def crew_of(
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    threads: int | None = None,
    **more: Any,
) -> Crew:
    """What is chosen for five clients of a tiny base, built with one process."""
    config = make_config(base_folder, clients_folder, {**LONG, **more})
    alone = config.engine.model_copy(update={"workers": 1})
    built = build_experiment(config.model_copy(update={"engine": alone}), base)
    clients = built.clients.data.values()  # type: ignore[attr-defined]
    return choose_crew(config, built.kind, built.algorithm, clients, threads)


@pytest.mark.usefixtures("four_cores")
def test_a_long_run_gets_a_worker_for_each_share_and_a_short_one_none(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    places = (base, base_folder, clients_folder)
    assert (crew_of(*places).count, crew_of(*places).threads) == (2, 1), "five clients, two shares"
    assert crew_of(*places, **{"rounds.count": 2}).count == 1
    assert crew_of(*places, **{"rounds.participation": 0.4}).count == 1, "two clients, one share"


@pytest.mark.usefixtures("four_cores")
def test_a_run_goes_on_with_the_threads_that_it_had(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    places = (base, base_folder, clients_folder)
    several, one = crew_of(*places, threads=2), crew_of(*places, threads=1)
    assert (several.count, several.threads) == (1, 2) and (one.count, one.threads) == (2, 1)


def test_a_program_that_did_not_ask_trains_in_one_process(
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processors, "free_cores", lambda: 4)
    main = ModuleType("__main__")
    main.__file__ = str(tmp_path / "program.py")
    (tmp_path / "program.py").write_text("", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert crew_of(base, base_folder, clients_folder).count == 1
    assert crew_of(base, base_folder, clients_folder, **{"engine.workers": 3}).count == 3


def test_there_is_always_a_core_and_never_more_than_there_are() -> None:
    assert 1 <= free_cores() <= max(1, torch.multiprocessing.cpu_count())
