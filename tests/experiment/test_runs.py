"""Whole runs: bit for bit local training without coupling, and hashes that chain.

Evaluation changes nothing, and the best round is kept.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmira.adapters import digest
from fedmira.experiment import build_experiment, run_experiment
from fedmira.model import BaseModel
from fedmira.runs import Result
from small import CLIENTS, adapter_bytes, adapters_of, events_of, make_config, run_loop, table_of

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def run(
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """Runs in a new folder; the same settings are run once."""
    done: dict[str, Result] = {}

    def once(**settings: Any) -> Result:
        keys = {name.replace("__", "."): value for name, value in settings.items()}
        if repr(keys) not in done:
            experiment = build_experiment(make_config(base_folder, clients_folder, keys), base)
            done[repr(keys)] = run_experiment(experiment, tmp_path_factory.mktemp("runs") / "run")
        return done[repr(keys)]

    return once


def weights_of(folder: Path) -> dict[str, bytes]:
    return {
        name: data for name, data in adapter_bytes(folder).items() if name.endswith(".safetensors")
    }


NO_COUPLING: list[dict[str, Any]] = [
    {"algorithm__coupling": 0.0},
    {"algorithm__coupling": 0.0, "algorithm__space": "factor", "graph__kind": "random"},
    {"algorithm__server_step": 0.0, "graph__kind": "category", "algorithm__neighbours": "fresh"},
]


@pytest.mark.parametrize("settings", NO_COUPLING, ids=["product", "factor", "server step 0"])
def test_no_coupling_is_local_training_bit_for_bit(run: Run, settings: dict[str, Any]) -> None:
    common = {"rounds__participation": 0.6, "evaluation__every": 1}
    local, uncoupled = run(algorithm__name="local", **common), run(**settings, **common)
    assert adapter_bytes(uncoupled.folder).keys() == adapter_bytes(local.folder).keys()
    assert adapter_bytes(uncoupled.folder, cards=False) == adapter_bytes(local.folder, cards=False)
    assert table_of(uncoupled.folder, "clients") == table_of(local.folder, "clients")
    for kind in ("train", "evaluate"):
        assert events_of(uncoupled.folder, kind) == events_of(local.folder, kind)


def test_two_runs_of_one_seed_are_equal_and_another_seed_is_not(
    run: Run, base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    first = run(rounds__participation=0.6)
    again = run_experiment(
        build_experiment(
            make_config(base_folder, clients_folder, {"rounds.participation": 0.6}), base
        ),
        tmp_path / "again",
    )
    assert adapter_bytes(again.folder) == adapter_bytes(first.folder)
    assert events_of(again.folder, timing=False) == events_of(first.folder, timing=False)
    other = run(rounds__participation=0.6, seed=1)
    assert weights_of(other.folder) != weights_of(first.folder)


CHAINED: dict[str, dict[str, Any]] = {
    "local": {"algorithm__name": "local"},
    "fedavg": {"algorithm__name": "fedavg"},
    "product": {"graph__kind": "category"},
    "factor": {"graph__kind": "random", "algorithm__space": "factor"},
    "learned": {"graph__warmup_rounds": 1},
}


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize("name", CHAINED)
def test_what_was_saved_is_loaded_the_next_time(run: Run, name: str, participation: float) -> None:
    result = run(**CHAINED[name], rounds__participation=participation, rounds__count=4)
    saved: dict[str, str] = {}
    shared = ""
    compared = 0
    trains, aligns = events_of(result.folder, "train"), events_of(result.folder, "align")
    for number in range(1, 5):
        for event in (event for event in trains if event["round"] == number):
            expected = shared if name == "fedavg" else saved.get(event["client"], "")
            if expected:
                compared += 1
                assert event["loaded_hash"] == expected
            assert event["sent_hash"] != event["loaded_hash"], "training acts"
        for event in (event for event in aligns if event["round"] == number):
            saved[event["client"]] = shared = event["saved_hash"]
    assert compared >= (3 * 5 if participation == 1 else 1)
    for client, adapter in result.adapters.items():
        if name == "fedavg":
            assert digest(adapter) == shared
        elif client in saved:
            assert digest(adapter) == saved[client]


def test_the_adapter_trained_from_in_round_2_depends_on_the_coupling(run: Run) -> None:
    common = {"graph__kind": "category", "rounds__count": 2}
    loaded = []
    for coupling in (0.0, 1.0):
        events = events_of(run(algorithm__coupling=coupling, **common).folder, "train")
        loaded.append({(event["round"], event["client"]): event["loaded_hash"] for event in events})
    assert all(loaded[0][1, client] == loaded[1][1, client] for client in CLIENTS)
    assert all(loaded[0][2, client] != loaded[1][2, client] for client in CLIENTS)


@pytest.mark.parametrize("participation", [1.0, 0.6])
def test_evaluation_between_rounds_changes_no_training(run: Run, participation: float) -> None:
    common = {"adapter__dropout": 0.3, "rounds__participation": participation}
    often, never = (
        run(evaluation__every=1, evaluation__rouge=True, **common),
        run(evaluation__every=0, **common),
    )
    assert weights_of(often.folder) == weights_of(never.folder)
    assert events_of(often.folder, "train") == events_of(never.folder, "train")
    assert {event["round"] for event in events_of(often.folder, "evaluate")} == {0, 1, 2, 3}
    assert {event["round"] for event in events_of(never.folder, "evaluate")} == {0, 3}


def test_dropout_is_still_active_after_an_evaluation(run: Run) -> None:
    """Round 1 comes after the evaluation of the base.

    A model left in evaluation mode would train as without dropout.
    """
    common = {"evaluation__every": 1, "algorithm__name": "local"}
    with_dropout, without = run(adapter__dropout=0.3, **common), run(**common)
    for number in (1, 2, 3):
        left, right = (
            [
                event["loss"]
                for event in events_of(result.folder, "train")
                if event["round"] == number
            ]
            for result in (with_dropout, without)
        )
        # More than the rounding by which the two layouts of a batch differ.
        assert all(abs(one - other) > 1e-4 for one, other in zip(left, right, strict=True))


def test_the_evaluated_loss_does_not_depend_on_the_token_budget(
    run: Run, base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    adapters = run(rounds__participation=0.6).adapters
    found = []
    for budget in (1, 100, 100_000):
        evaluator = build_experiment(
            make_config(base_folder, clients_folder, {"engine.token_budget": budget}), base
        ).clients
        found.append(evaluator.losses(adapters))
    for losses in found[1:]:
        for client, loss in losses.items():
            assert (
                loss.tokens
                == found[0][client].tokens
                == sum(len(row.response) for row in evaluator.data[client].test)
            )
            assert loss.per_token == pytest.approx(found[0][client].per_token, rel=1e-5)


def test_the_best_validation_round_is_what_is_saved(
    run: Run, base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    """A learning rate at which clients get worse again.

    So the best round is not the last for all of them.
    """
    settings = {
        "local.learning_rate": 0.6,
        "rounds.count": 4,
        "evaluation.every": 1,
        "algorithm.name": "local",
    }
    result = run(
        **{key.replace(".", "__"): value for key, value in settings.items()},
        evaluation__select="best",
    )
    validation: dict[str, dict[int, float]] = {client: {} for client in CLIENTS}
    test: dict[tuple[str, int], float] = {}
    for event in events_of(result.folder, "evaluate"):
        validation[event["client"]][event["round"]] = event["validation_loss"]
        test[event["client"], event["round"]] = event["test_loss"]
    best = {
        client: min(losses, key=lambda number: (losses[number], number))
        for client, losses in validation.items()
    }
    assert set(best.values()) != {4}, "the case must be one in which the choice matters"
    experiment, states, _ = run_loop(make_config(base_folder, clients_folder, settings), base)
    for number, state in enumerate(states):
        for client, loss in experiment.clients.losses(state.adapters, "validation").items():
            assert loss.per_token == validation[client][number]
    for row in table_of(result.folder, "clients"):
        client = row["client"]
        assert set(validation[client]) == {0, 1, 2, 3, 4} and int(row["best_round"]) == best[client]
        assert float(row["best_validation_loss"]) == validation[client][best[client]]
        assert float(row["best_test_loss"]) == test[client, best[client]]
        assert float(row["after_align_loss"]) == pytest.approx(test[client, best[client]], rel=1e-6)
        assert digest(result.adapters[client]) == digest(states[best[client]].adapters[client])
    by_row: dict[str, list[tuple[float, int]]] = {}
    for row in table_of(result.folder, "validation"):
        by_row.setdefault(row["client"], []).append((float(row["loss"]), int(row["tokens"])))
    for client, found in by_row.items():
        total, tokens = (sum(column) for column in zip(*found, strict=True))
        assert total / tokens == pytest.approx(validation[client][best[client]], rel=1e-5), (
            "of the adapter that was saved"
        )
    assert set(by_row) == set(CLIENTS)
    last = run(
        **{key.replace(".", "__"): value for key, value in settings.items()},
        evaluation__select="last",
    )
    assert [row["best_round"] for row in table_of(last.folder, "clients")] == [
        str(best[client]) for client in sorted(CLIENTS)
    ]
    assert weights_of(last.folder) != weights_of(result.folder)


def test_clients_of_different_ranks_run_together(run: Run) -> None:
    result = run(adapter__ranks={"apple-1": 2, "birch-1": 8}, graph__kind="category")
    ranks = {
        client: {value.shape[0] for name, value in adapter.items() if "lora_A" in name}
        for client, adapter in adapters_of(result.folder).items()
    }
    assert ranks == {"apple-1": {2}, "apple-2": {4}, "apple-3": {4}, "birch-1": {8}, "birch-2": {4}}
    configs = {
        client: json.loads(
            (result.folder / "adapters" / client / "adapter_config.json").read_text(
                encoding="utf-8"
            )
        )
        for client in CLIENTS
    }
    assert {client: (config["r"], config["lora_alpha"]) for client, config in configs.items()} == {
        client: (next(iter(ranks[client])), 8) for client in CLIENTS
    }


def test_training_lowers_the_loss_of_the_rows_that_are_trained_on(run: Run) -> None:
    result = run(algorithm__name="local", rounds__count=4, local__steps=6)
    for row in result.clients:
        assert row["before_align_loss"] == row["after_align_loss"], (
            "local training has nothing to align"
        )
    first, last = (
        statistics.fmean(
            event["loss"] for event in events_of(result.folder, "train") if event["round"] == number
        )
        for number in (1, 4)
    )
    assert last < 0.9 * first
