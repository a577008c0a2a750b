"""A run with newcomers in it: what is decided for them, and that nothing else is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmira.data import ClientSummary
from fedmira.errors import ConfigError
from fedmira.experiment import (
    Experiment,
    build_experiment,
    make_scheme,
    run_experiment,
    with_newcomers,
)
from fedmira.privacy import PrivacyPlan
from fedmira.privacy.accountant import epsilon_of
from small import CLIENTS, events_of, local_of, make_config, table_of, with_clients


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


class Doorway(Elsewhere):
    """Clients of one process of whom some come later; the others do not know them before.

    Args:
        inner: all clients.
        later: round -> who is there before it.
    """

    def __init__(self, inner: Any, later: Mapping[int, Sequence[str]]) -> None:
        super().__init__(inner)
        self.later, self.looked = dict(later), 0
        away = {name for names in later.values() for name in names}
        self.parties = {name: of for name, of in inner.parties.items() if name not in away}
        self.refused: list[tuple[str, str]] = []

    def waiting(self) -> Mapping[str, ClientSummary]:
        self.looked += 1
        names = sorted(self.later.pop(self.looked, ()))
        return {name: self.inner.parties[name] for name in names}

    def admit(self, parties: Mapping[str, ClientSummary]) -> None:
        self.parties |= parties

    def dismiss(self, clients: Sequence[str]) -> None:
        for client in clients:
            del self.parties[client]

    def turn_away(self, client: str, reason: str) -> None:
        self.refused.append((client, reason))

    def turned_away(self) -> Sequence[str]:
        told, self.refused = self.refused, []
        return [reason for _, reason in told]


def with_door(
    base: Path, data: Path, later: Mapping[int, Sequence[str]], settings: Mapping[str, Any]
) -> Experiment:
    """The experiment of those who are there from the beginning, and a door for the others."""
    asked = {"federation.open": True, "rounds.count": 3, "evaluation.every": 1, **settings}
    whole = build_experiment(make_config(base, data, asked))
    clients: Any = Doorway(local_of(whole), later)
    scheme = make_scheme(whole.config, whole.kind, clients.parties)
    return replace(
        whole,
        clients=clients,
        parties=clients.parties,
        ranks=scheme.ranks,
        starts=scheme.starts,
        graph=scheme.graph,
        algorithm=scheme.algorithm,
        door=clients,
        privacy=None,
    )


@pytest.mark.parametrize("method", ["two-level", "mira", "fedavg", "ditto"])
def test_a_run_goes_on_with_those_who_come(
    method: str, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    later = {2: ["birch-2"], 3: ["apple-3", "apple-1"]}
    settings = {"algorithm.name": method}
    result = run_experiment(
        with_door(base_folder, clients_folder, later, settings), tmp_path / "run"
    )
    founders = ["apple-2", "birch-1"]
    order = [*founders, "birch-2", "apple-1", "apple-3"]
    assert [row["client"] for row in table_of(result.folder, "clients")] == order
    joins = [(event["round"], event["client"]) for event in events_of(result.folder, "join")]
    assert joins == [(2, "birch-2"), (3, "apple-1"), (3, "apple-3")]
    trained = [(e["round"], e["client"]) for e in events_of(result.folder, "train")]
    assert len(trained) == 2 + 3 + 5 and (3, "apple-3") in trained and (2, "apple-3") not in trained
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    means = "over 2 clients before round 2, over 3 from round 2 and over 5 from round 3 on"
    assert means in page
    told = json.loads((result.folder / "run.json").read_text(encoding="utf-8"))
    assert told["data"]["clients"] == order and told["clients"] == 5


def test_who_would_be_one_too_many_is_turned_away_and_a_fixed_graph_says_who_is_alone(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {
        "algorithm.name": "mira",
        "graph.kind": "random",
        "federation.most_clients": 4,
    }
    later = {2: ["birch-2", "apple-1"]}
    result = run_experiment(
        with_door(base_folder, clients_folder, later, settings), tmp_path / "run"
    )
    assert list(result.adapters) == ["apple-2", "apple-3", "birch-1", "apple-1"]
    warnings = [event["message"] for event in events_of(result.folder, "warning")]
    assert any(
        text.startswith("client 'birch-2' cannot join") and "most_clients" in text
        for text in warnings
    )
    assert any(text.startswith("apple-1 has no edge in the graph (random)") for text in warnings)


def test_a_newcomer_whose_measurement_is_interrupted_is_not_there(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    experiment = with_door(
        base_folder, clients_folder, {2: ["birch-2"]}, {"algorithm.name": "two-level"}
    )
    door: Any = experiment.door
    losses = door.inner.losses

    def interrupted(adapters: Mapping[str, Any], split: str = "test") -> Any:
        if set(adapters) == {"birch-2"}:
            raise KeyboardInterrupt
        return losses(adapters, split)

    door.losses = interrupted
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, tmp_path / "run")
    told = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert told["status"] == "interrupted" and told["clients"] == 4
    assert "birch-2" not in told["data"]["clients"]
    assert sorted(path.name for path in (tmp_path / "run" / "adapters").glob("*-*")) == [
        "apple-1",
        "apple-2",
        "apple-3",
        "birch-1",
    ]
