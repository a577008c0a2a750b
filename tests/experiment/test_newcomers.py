"""A run with newcomers in it: what is decided for them, and that nothing else is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmira.data import ClientSummary
from fedmira.errors import ConfigError
from fedmira.experiment import Experiment, build_experiment, with_newcomers
from fedmira.privacy import PrivacyPlan
from fedmira.privacy.accountant import epsilon_of
from small import CLIENTS, local_of, make_config, with_clients


class Elsewhere:
    """The clients of an experiment, as if their half of the method were on other machines."""

    method = None

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def apart(base: Path, data: Path, settings: Mapping[str, Any]) -> Experiment:
    experiment = build_experiment(make_config(base, data, settings))
    clients: Any = Elsewhere(local_of(experiment))
    return with_clients(experiment, clients)


def newcomer(experiment: Experiment, name: str, **more: Any) -> dict[str, ClientSummary]:
    like = next(iter(experiment.parties.values()))
    return {name: replace(like, client_id=name, **more)}


def test_what_the_others_have_stays_and_a_newcomer_stands_behind_them(
    base_folder: Path, clients_folder: Path
) -> None:
    experiment = apart(base_folder, clients_folder, {"federation.open": True})
    # By its name it would stand first.
    grown = with_newcomers(experiment, newcomer(experiment, "aaa"), 3)
    assert list(grown.parties) == [*CLIENTS, "aaa"] == list(grown.algorithm.context.clients)
    assert grown.came == {"aaa": 3} and grown.algorithm.context.rounds_of("aaa") == 1
    for client in CLIENTS:
        assert grown.ranks[client] == experiment.ranks[client]
        start = experiment.starts[client]
        assert all(torch.equal(grown.starts[client][name], of) for name, of in start.items())
    later = with_newcomers(grown, newcomer(experiment, "bbb"), 4)
    assert list(later.parties)[-2:] == ["aaa", "bbb"] and later.came == {"aaa": 3, "bbb": 4}


def test_epsilon_of_a_newcomer_counts_its_own_rows_and_rounds(
    base_folder: Path, clients_folder: Path
) -> None:
    settings = {
        "federation.open": True,
        "privacy": {"kind": "row", "noise": 2.0, "delta": 1e-4},
        "data.validation_fraction": 0.0,
        "algorithm.name": "fedavg",
    }
    experiment = apart(base_folder, clients_folder, settings)
    grown = with_newcomers(experiment, newcomer(experiment, "new", train_rows=40), 3)
    plan = grown.privacy
    assert isinstance(plan, PrivacyPlan)
    spent = plan.spent({**dict.fromkeys(CLIENTS, 3), "new": 1})
    steps = experiment.config.local.steps
    assert spent["new"] == epsilon_of(2.0, 4 / 40, steps, 1e-4)
    assert experiment.privacy is not None
    before = experiment.privacy.spent(dict.fromkeys(CLIENTS, 3))
    assert {client: spent[client] for client in CLIENTS} == before
    assert 0 < spent["new"] < min(before.values()) < math.inf
    # So many rows that one of them could be given away whole: nothing is promised.
    with pytest.raises(ConfigError, match="promises nothing"):
        with_newcomers(experiment, newcomer(experiment, "big", train_rows=20_000), 3)


def test_a_written_config_has_the_keys_of_newcomers_only_where_they_are_set(
    base_folder: Path, clients_folder: Path
) -> None:
    from fedmira.config import dump_config

    closed = dump_config(make_config(base_folder, clients_folder))
    opened = dump_config(make_config(base_folder, clients_folder, {"federation.open": ["x"]}))
    assert "most_clients" not in closed and "\nopen" not in closed
    assert "\nopen" in opened and "most_clients" not in opened
