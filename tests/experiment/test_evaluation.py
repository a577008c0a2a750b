"""What a run measures, and what it knows already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from fedmira.adapters import Adapter
from fedmira.clients import LocalClients
from fedmira.experiment import build_experiment, resume_experiment, run_experiment
from fedmira.model import BaseModel
from fedmira.observers import MeasuringEvent, Observer
from small import adapter_bytes, events_of, local_of, make_config, table_of, with_clients

SETTINGS: dict[str, Any] = {
    "algorithm.name": "local",
    "rounds.count": 3,
    "rounds.participation": 0.4,
    "evaluation.every": 1,
}


@dataclass(eq=False)
class Noting(LocalClients):
    """Notes whose rows are measured: (split, clients)."""

    asked: list[tuple[str, list[str]]] = field(default_factory=list)

    def row_losses(
        self, adapters: Mapping[str, Adapter], split: Any = "validation"
    ) -> dict[str, list[float]]:
        self.asked.append((split, list(adapters)))
        return super().row_losses(adapters, split)


def noting(experiment: Any) -> tuple[Any, Noting]:
    inner = local_of(experiment, 3)
    clients = Noting(inner.method, inner.kind, inner.data, inner.settings, 3)
    return with_clients(experiment, clients), clients


def losses_of(folder: Path) -> dict[tuple[int, str], tuple[float, float]]:
    return {
        (event["round"], event["client"]): (event["test_loss"], event["validation_loss"])
        for event in events_of(folder, "evaluate")
    }


def test_only_clients_whose_adapter_changed_are_measured_again(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    experiment = build_experiment(make_config(base_folder, clients_folder, SETTINGS), base)
    watched, clients = noting(experiment)
    run_experiment(watched, tmp_path / "run")
    trained = {
        number: sorted(
            event["client"]
            for event in events_of(tmp_path / "run", "train")
            if event["round"] == number
        )
        for number in (1, 2, 3)
    }
    everybody = sorted(experiment.ranks)
    assert all(len(names) == 2 for names in trained.values())
    assert clients.asked == [
        (split, names)
        for names in (everybody, trained[1], trained[2], trained[3])
        for split in ("test", "validation")
    ], "each once with each adapter, and nothing for the tables at the end"
    losses = losses_of(tmp_path / "run")
    for number in (1, 2, 3):
        for client in everybody:
            same = losses[number, client] == losses[number - 1, client]
            assert same == (client not in trained[number])
    for row in table_of(tmp_path / "run", "clients"):
        assert float(row["after_align_loss"]) == pytest.approx(losses[3, row["client"]][0])


@pytest.mark.parametrize("name", ["fedavg", "mtlora"])
def test_where_a_round_changes_everybody_everybody_is_measured(
    name: str, base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "algorithm.name": name, "rounds.count": 2}
    watched, clients = noting(
        build_experiment(make_config(base_folder, clients_folder, settings), base)
    )
    run_experiment(watched, tmp_path / "run")
    assert {len(names) for split, names in clients.asked if split == "validation"} == {5}
    losses = losses_of(tmp_path / "run")
    never = set(clients.data) - {event["client"] for event in events_of(tmp_path / "run", "train")}
    assert never and all(losses[2, client] != losses[0, client] for client in never)


@pytest.mark.parametrize("until", [1, 2])
def test_a_run_that_goes_on_knows_what_was_measured(
    until: int, base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(base_folder, clients_folder, SETTINGS)
    whole, _ = noting(build_experiment(config, base))
    run_experiment(whole, tmp_path / "whole")
    first, _ = noting(build_experiment(config, base))
    run_experiment(first, tmp_path / "held", until=until)
    later, clients = noting(build_experiment(config, base, resumed=tmp_path / "held"))
    resume_experiment(later, tmp_path / "held")
    assert all(len(names) == 2 for _, names in clients.asked)
    assert losses_of(tmp_path / "held") == losses_of(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "held") == adapter_bytes(tmp_path / "whole")
    for name in ("clients.csv", "validation.csv"):
        found, expected = (
            (tmp_path / run / "metrics" / name).read_bytes() for run in ("held", "whole")
        )
        assert found == expected


def test_a_second_run_on_the_same_rows_reads_the_base_and_says_so(
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDMIRA_CACHE", str(tmp_path / "cache"))
    config = make_config(base_folder, clients_folder, {**SETTINGS, "rounds.count": 1})
    for run in ("first", "second"):
        run_experiment(build_experiment(config, base), tmp_path / run)
    said = [
        json.loads((tmp_path / run / "run.json").read_text(encoding="utf-8")).get(
            "base_losses_from_cache"
        )
        for run in ("first", "second")
    ]
    assert said == [None, ["test", "validation"]]
    assert losses_of(tmp_path / "first") == losses_of(tmp_path / "second")
    for name in ("clients.csv", "validation.csv"):
        first, second = (
            (tmp_path / run / "metrics" / name).read_bytes() for run in ("first", "second")
        )
        assert first == second


class Listening(Observer):
    """Keeps what it is told of measurements."""

    def __init__(self) -> None:
        self.told: list[MeasuringEvent] = []

    def on_measuring(self, event: MeasuringEvent) -> None:
        self.told.append(event)


def test_observers_hear_how_far_evaluation_and_answers_are(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {
        **SETTINGS,
        "rounds.count": 1,
        "rounds.participation": 1.0,
        "evaluation.rouge": True,
        "engine.token_budget": 8,
    }
    experiment = build_experiment(make_config(base_folder, clients_folder, settings), base)
    listening = Listening()
    plain = with_clients(experiment, local_of(experiment, 2))
    run_experiment(plain, tmp_path / "run", [listening])
    rows = {
        split: sum(len(getattr(client, split)) for client in local_of(experiment).data.values())
        for split in ("test", "validation")
    }
    expected = [
        *[("evaluating", split) for _ in range(2) for split in ("test", "validation")],
        ("answering", "test"),
    ]
    begun = [place for place, event in enumerate(listening.told) if event.seconds_left is None]
    assert [(listening.told[k].work, listening.told[k].split) for k in begun] == expected
    for first, last, (work, split) in zip(
        begun, [*begun[1:], len(listening.told)], expected, strict=True
    ):
        part = listening.told[first:last]
        assert {(event.work, event.split, event.rows) for event in part} == {
            (work, split, rows[split])
        }
        done = [event.done for event in part]
        assert done[0] == 0 and done[-1] == rows[split] and done == sorted(set(done))
        assert len(done) > 2, "several shares"
        assert part[-1].seconds_left == 0


FEW = {**SETTINGS, "evaluation.rows": 1, "rounds.participation": 1.0}


def few_runs(
    base: BaseModel, base_folder: Path, clients_folder: Path, place: Path, **more: Any
) -> Any:
    config = make_config(base_folder, clients_folder, {**FEW, **more})
    experiment = build_experiment(config, base)
    run_experiment(experiment, place)
    return experiment


def test_a_run_shows_few_rows_and_its_tables_all(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    experiment = few_runs(base, base_folder, clients_folder, tmp_path / "few")
    few_runs(base, base_folder, clients_folder, tmp_path / "whole", **{"evaluation.rows": 0})
    assert adapter_bytes(tmp_path / "few") == adapter_bytes(tmp_path / "whole"), (
        "what is measured changes nothing that is learned"
    )
    clients = local_of(experiment)
    drawn = clients.few(1, experiment.config.seed)
    tested = {name: len(client.test) for name, client in clients.data.items()}
    assert any(count > 1 for count in tested.values())
    for event in events_of(tmp_path / "few", "evaluate"):
        (row,) = drawn.data[event["client"]].test
        assert event["test_tokens"] == len(row.response)
        assert row in clients.data[event["client"]].test
    base_of_few = drawn.losses(experiment.starts)
    losses = losses_of(tmp_path / "few")
    few_rows, all_rows = (
        {row["client"]: row for row in table_of(tmp_path / run, "clients")}
        for run in ("few", "whole")
    )
    for name in tested:
        assert losses[0, name][0] == pytest.approx(base_of_few[name].per_token, rel=1e-5)
        for column in ("base_loss", "before_align_loss", "after_align_loss"):
            assert float(few_rows[name][column]) == pytest.approx(
                float(all_rows[name][column]), rel=1e-5
            )
        best = min(range(4), key=lambda number: losses[number, name][1])
        assert int(few_rows[name]["best_round"]) == best
        assert float(few_rows[name]["best_test_loss"]) == pytest.approx(losses[best, name][0])
    parts = [part for client in clients.data.values() for part in (client.test, client.validation)]
    told = json.loads((tmp_path / "few" / "run.json").read_text(encoding="utf-8"))["notes"]
    left_out = sum(len(part) - 1 for part in parts)
    assert any(f"leave out {left_out} of {sum(map(len, parts))}" in note for note in told)
    judged = table_of(tmp_path / "few", "validation")
    assert len(judged) == sum(len(client.validation) for client in clients.data.values())


def test_the_adapter_of_the_best_round_is_that_of_the_rows_that_are_shown(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    experiment = few_runs(
        base, base_folder, clients_folder, tmp_path / "run", **{"evaluation.select": "best"}
    )
    losses = losses_of(tmp_path / "run")
    clients = local_of(experiment)
    for row in table_of(tmp_path / "run", "clients"):
        best = min(range(4), key=lambda number: losses[number, row["client"]][1])
        assert int(row["best_round"]) == best
        saved = experiment.kind.read(tmp_path / "run" / "adapters" / row["client"])
        assert float(row["after_align_loss"]) == pytest.approx(
            clients.losses({row["client"]: saved})[row["client"]].per_token, rel=1e-5
        ), "of all rows"


def test_a_run_that_shows_few_rows_goes_on_to_the_same_bytes(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    part = {"rounds.participation": 0.4}
    few_runs(base, base_folder, clients_folder, tmp_path / "whole", **part)
    config = make_config(base_folder, clients_folder, {**FEW, **part})
    run_experiment(build_experiment(config, base), tmp_path / "held", until=2)
    later = build_experiment(config, base, resumed=tmp_path / "held")
    resume_experiment(later, tmp_path / "held")
    for name in ("clients.csv", "validation.csv"):
        held, whole = (tmp_path / run / "metrics" / name for run in ("held", "whole"))
        assert held.read_bytes() == whole.read_bytes()
    found, expected = losses_of(tmp_path / "held"), losses_of(tmp_path / "whole")
    assert found == expected


def test_the_drawn_rows_of_a_client_depend_on_seed_and_client_alone(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    clients = local_of(build_experiment(make_config(base_folder, clients_folder, FEW), base))
    name = max(clients.data, key=lambda name: len(clients.data[name].test))
    all_rows = clients.data[name].test
    alone = replace(clients, data={name: clients.data[name]})
    assert len({alone.few(2, seed).data[name].test for seed in range(20)}) > 1
    for seed in range(3):
        drawn = clients.few(2, seed).data[name].test
        assert drawn == alone.few(2, seed).data[name].test
        assert list(drawn) == [row for row in all_rows if row in drawn], "in their order"
    assert clients.few(1000, 0).data[name].test == all_rows
