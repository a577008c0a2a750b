"""A run that was cut off anywhere continues to the same bytes.

One that was tampered with is refused. (Killed processes: tests/cli.)
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmira.config import ModelSettings
from fedmira.errors import RunFolderError
from fedmira.experiment import (
    Experiment,
    build_experiment,
    resume_experiment,
    run_experiment,
)
from fedmira.model import BaseModel, load_base
from fedmira.observers import EvaluationEvent, Observer, RoundEvent
from fedmira.runs import Result, accept_files
from small import adapter_bytes, events_of, make_config, table_of, write_base, write_clients

FEDERATIONS: dict[str, dict[str, Any]] = {
    "learned graph, some clients": {
        "rounds.participation": 0.6,
        "rounds.count": 5,
        "evaluation.every": 2,
    },
    "best of rounds that get worse": {
        "algorithm.name": "local",
        "rounds.count": 4,
        "evaluation.every": 1,
        "evaluation.select": "best",
        "local.learning_rate": 0.6,
    },
    "factors with kept moments": {
        "graph.kind": "random",
        "algorithm.space": "factor",
        "local.optimizer_state": "kept",
        "rounds.participation": 0.6,
        "rounds.count": 4,
        "adapter.dropout": 0.2,
    },
    "safeguard": {
        "algorithm.safeguard": True,
        "graph.kind": "uniform",
        "rounds.participation": 0.6,
        "rounds.count": 4,
        "evaluation.every": 2,
    },
    "safeguard with kept moments": {
        "algorithm.safeguard": True,
        "graph.kind": "uniform",
        "algorithm.space": "factor",
        "local.optimizer_state": "kept",
        "rounds.participation": 0.6,
        "rounds.count": 4,
    },
    "fedavg with kept moments": {
        "algorithm.name": "fedavg",
        "local.optimizer_state": "kept",
        "rounds.participation": 0.6,
        "rounds.count": 4,
    },
    "sophia with kept curvature": {
        "algorithm.name": "fedavg",
        "local.optimizer": "sophia",
        "local.optimizer_state": "kept",
        "local.sophia_refresh": 3,
        "rounds.participation": 0.6,
        "rounds.count": 4,
    },
    "seeds and numbers": {
        "algorithm.name": "fedkseed",
        "local.optimizer": "zeroth-order",
        "rounds.participation": 0.6,
        "rounds.count": 4,
    },
    "ditto, some clients": {
        "algorithm.name": "ditto",
        "rounds.participation": 0.6,
        "rounds.count": 4,
    },
    "fedit-finetune": {"algorithm.name": "fedit-finetune", "rounds.count": 4},
    "fedalt, learned graph": {
        "algorithm.name": "fedalt",
        "rounds.participation": 0.6,
        "rounds.count": 4,
        "evaluation.every": 2,
    },
    "fedalt, factors and learned shares": {
        "algorithm.name": "fedalt",
        "algorithm.rest_space": "factor",
        "algorithm.learned_share": True,
        "graph.kind": "uniform",
        "rounds.participation": 0.6,
        "rounds.count": 4,
    },
    "feddpa, some clients": {
        "algorithm.name": "feddpa",
        "rounds.participation": 0.6,
        "rounds.count": 4,
    },
    "fola, some clients": {
        "algorithm.name": "fola",
        "rounds.participation": 0.6,
        "rounds.count": 4,
    },
    "cgc-lora, some clients": {
        "algorithm.name": "cgc-lora",
        "algorithm.common_experts": 2,
        "rounds.participation": 0.6,
        "rounds.count": 4,
    },
    "gossip, some clients": {
        "algorithm.name": "gossip",
        "graph.kind": "category",
        "rounds.participation": 0.6,
        "rounds.count": 4,
    },
    "mtlora, some clients": {
        "algorithm.name": "mtlora",
        "rounds.participation": 0.6,
        "rounds.count": 4,
    },
    "mtlora, own parts aligned": {
        "algorithm.name": "mtlora",
        "algorithm.own_coupling": 1.0,
        "rounds.participation": 0.6,
        "rounds.count": 4,
    },
    "rolora, some clients": {
        "algorithm.name": "rolora",
        "rounds.participation": 0.6,
        "rounds.count": 4,
    },
    "flora, some clients of ranks that differ": {
        "algorithm.name": "flora",
        "adapter.ranks": {"apple-1": 6},
        "rounds.participation": 0.6,
        "rounds.count": 4,
    },
    "scaffold, some clients": {
        "algorithm.name": "scaffold",
        "local.optimizer": "sgd",
        "local.learning_rate": 1.0,
        "rounds.participation": 0.6,
        "rounds.count": 4,
    },
    "fedopt, some clients": {
        "algorithm.name": "fedopt",
        "rounds.participation": 0.6,
        "rounds.count": 4,
    },
    "fedlease, some clients": {
        "algorithm.name": "fedlease",
        "rounds.participation": 0.6,
        "rounds.count": 4,
        "evaluation.every": 2,
    },
    "two levels, some clients of ranks that differ": {
        "algorithm.name": "two-level",
        "adapter.ranks": {"apple-1": 2},
        "rounds.participation": 0.6,
        "rounds.count": 5,
        "evaluation.every": 2,
    },
    "two levels with safeguard and a schedule": {
        "algorithm.name": "two-level",
        "algorithm.safeguard": True,
        "graph.kind": "uniform",
        "local.schedule": "cosine",
        "local.warmup_steps": 3,
        "local.lora_plus_ratio": 4.0,
        "adapter.rslora": True,
        "rounds.participation": 0.6,
        "rounds.count": 4,
        "evaluation.every": 2,
    },
    "p-tuning with kept moments": {
        "adapter.kind": "p-tuning",
        "adapter.virtual_tokens": 4,
        "adapter.encoder_hidden": 8,
        "algorithm.name": "fedavg",
        "local.optimizer_state": "kept",
        "rounds.participation": 0.6,
        "rounds.count": 3,
    },
    "mira on prefixes, learned graph": {
        "adapter.kind": "prefix",
        "adapter.virtual_tokens": 3,
        "algorithm.space": "factor",
        "algorithm.safeguard": True,
        "rounds.participation": 0.6,
        "rounds.count": 3,
    },
    "ranks that differ": {
        "graph.kind": "category",
        "adapter.ranks": {"apple-1": 2},
        "rounds.count": 3,
        "evaluation.every": 1,
    },
}


class PowerCut(BaseException):
    """Raised in the middle of a run.

    No Exception, so that it is not taken for a broken observer.
    """


class Cut(Observer):
    """Ends the run right after round `number` (0: after the base was evaluated)."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_evaluation(self, event: EvaluationEvent) -> None:
        if event.round == self.number == 0:
            raise PowerCut

    def on_round(self, event: RoundEvent) -> None:
        if event.round == self.number:
            raise PowerCut


def cut_at(number: int) -> list[Observer]:
    return [Cut(number)]


def built(
    base: BaseModel, base_folder: Path, clients_folder: Path, settings: Mapping[str, Any]
) -> Experiment:
    return build_experiment(make_config(base_folder, clients_folder, settings), base)


@pytest.fixture(scope="module")
def straight(
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Result]:
    """Every federation without an interruption."""
    folder = tmp_path_factory.mktemp("straight")
    return {
        name: run_experiment(built(base, base_folder, clients_folder, settings), folder / name)
        for name, settings in FEDERATIONS.items()
    }


def assert_equal_runs(found: Path, expected: Path) -> None:
    assert adapter_bytes(found) == adapter_bytes(expected)
    assert table_of(found, "clients") == table_of(expected, "clients")
    assert table_of(found, "rounds", timing=False) == table_of(expected, "rounds", timing=False)
    assert events_of(found, timing=False) == events_of(expected, timing=False)
    graphs = [folder / "graph.json" for folder in (found, expected)]
    assert graphs[0].exists() == graphs[1].exists()
    if graphs[0].exists():
        assert graphs[0].read_bytes() == graphs[1].read_bytes()


@pytest.mark.parametrize("name", FEDERATIONS)
def test_a_run_that_is_cut_off_after_every_round_ends_in_the_same_bytes(
    name: str,
    straight: dict[str, Result],
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
) -> None:
    count = FEDERATIONS[name]["rounds.count"]
    folder = tmp_path / "run"
    with pytest.raises(PowerCut):
        run_experiment(
            built(base, base_folder, clients_folder, FEDERATIONS[name]), folder, cut_at(0)
        )
    assert not list((folder / "checkpoint").glob("round-*")), (
        "cut off before anything could be kept"
    )
    for number in range(1, count + 1):
        with pytest.raises(PowerCut):
            resume_experiment(
                built(base, base_folder, clients_folder, FEDERATIONS[name]), folder, cut_at(number)
            )
        assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == [
            "adapters",
            *(f"round-{each:06d}" for each in (number - 1, number)),
            "run.json",
        ]
    result = resume_experiment(built(base, base_folder, clients_folder, FEDERATIONS[name]), folder)
    assert_equal_runs(folder, straight[name].folder)
    if FEDERATIONS[name].get("evaluation.select") == "best":
        assert {row["best_round"] for row in result.clients} != {count}, (
            "the case must be one in which an earlier adapter was kept"
        )
    assert result.clients == straight[name].clients and result.summary == straight[name].summary
    expected = straight[name].graph
    assert (result.graph is None) == (expected is None)
    if result.graph is not None and expected is not None:
        assert (result.graph.kind, result.graph.clients) == (
            expected.kind,
            expected.clients,
        ) and torch.equal(result.graph.edge_list, expected.edge_list)
    assert (
        len(json.loads((folder / "run.json").read_text(encoding="utf-8"))["resumed"]) == count + 1
    )
    keys = set()
    for place in (folder / "checkpoint").glob("round-*"):
        named = json.loads((place / "values.json").read_text(encoding="utf-8"))
        keys |= {key for table in named["tables"].values() for key in table.values()}
        keys |= {entry[0] for entry in named["memories"].values()}
    assert {path.stem for path in (folder / "checkpoint" / "adapters").iterdir()} == keys, (
        "nothing stays that nobody needs"
    )


def test_lines_of_a_round_that_was_not_finished_are_dropped(
    straight: dict[str, Result],
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
) -> None:
    name = "learned graph, some clients"
    folder = tmp_path / "run"
    with pytest.raises(PowerCut):
        run_experiment(
            built(base, base_folder, clients_folder, FEDERATIONS[name]), folder, cut_at(2)
        )
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(
            '{"event": "train", "round": 3, "client": "apple-1", "loss": 1.0}\n{"event": "tra'
        )
    with (folder / "metrics" / "rounds.csv").open("a", encoding="utf-8") as file:
        file.write("3,3,1.5\n")
    (folder / "checkpoint" / "round-000003.partial").mkdir()
    resume_experiment(built(base, base_folder, clients_folder, FEDERATIONS[name]), folder)
    assert_equal_runs(folder, straight[name].folder)


def test_resuming_a_finished_run_changes_nothing(
    straight: dict[str, Result],
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
) -> None:
    name = "ranks that differ"
    result = run_experiment(
        built(base, base_folder, clients_folder, FEDERATIONS[name]), tmp_path / "run"
    )
    before = (
        (result.folder / "events.jsonl").read_bytes(),
        (result.folder / "metrics" / "rounds.csv").read_bytes(),
    )
    again = resume_experiment(
        built(base, base_folder, clients_folder, FEDERATIONS[name]), tmp_path / "run"
    )
    assert (
        (result.folder / "events.jsonl").read_bytes(),
        (result.folder / "metrics" / "rounds.csv").read_bytes(),
    ) == before
    assert_equal_runs(again.folder, straight[name].folder)


def test_another_config_another_base_and_other_rows_are_refused(
    base: BaseModel, tmp_path: Path
) -> None:
    base_folder, data = write_base(tmp_path / "base"), write_clients(tmp_path / "data")
    settings = {"rounds.count": 2, "graph.kind": "uniform"}
    with pytest.raises(PowerCut):
        run_experiment(built(base, base_folder, data, settings), tmp_path / "run", cut_at(1))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    with pytest.raises(RunFolderError, match="made with other settings"):
        resume_experiment(
            built(base, base_folder, data, {**settings, "local.steps": 3}), tmp_path / "run"
        )

    from tiny import tiny_model

    tiny_model("llama", seed=5).save_pretrained(base_folder)
    other = load_base(ModelSettings(base=str(base_folder), device="cpu"))
    with pytest.raises(RunFolderError, match="the base model changed since this run began"):
        resume_experiment(built(other, base_folder, data, settings), tmp_path / "run")

    lines = (data / "apple-1" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (data / "apple-1" / "train.jsonl").write_text(
        "\n".join([lines[0].replace('"output": "w', '"output": "w1 w'), *lines[1:]]),
        encoding="utf-8",
    )
    with pytest.raises(RunFolderError, match="the data changed since this run began"):
        resume_experiment(built(base, base_folder, data, settings), tmp_path / "run")
    assert {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    } == before, "a refusal changes nothing"


def test_a_run_whose_config_lacks_newer_keys_is_resumed(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {"rounds.count": 2, "algorithm.name": "local"}
    whole = run_experiment(built(base, base_folder, clients_folder, settings), tmp_path / "whole")
    folder = tmp_path / "run"
    with pytest.raises(PowerCut):
        run_experiment(built(base, base_folder, clients_folder, settings), folder, cut_at(1))
    config = folder / "config.toml"
    lines = config.read_text(encoding="utf-8").splitlines(keepends=True)
    newer = ("workers = ", "threads = ", "advantage_temperature = ")
    kept = [line for line in lines if not line.startswith(newer)]
    assert len(kept) == len(lines) - 3
    config.write_text("".join(kept), encoding="utf-8")
    accept_files(folder, ["config.toml"])
    again = resume_experiment(built(base, base_folder, clients_folder, settings), folder)
    assert_equal_runs(again.folder, whole.folder)


def test_there_must_be_a_run_to_resume(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunFolderError, match="there is no such folder"):
        resume_experiment(built(base, base_folder, clients_folder, {}), tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_wall_time_adds_up_over_parts_that_were_cut_off(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings, folder, begun = (
        {"algorithm.name": "local", "rounds.count": 3},
        tmp_path / "run",
        time.monotonic(),
    )

    def seconds() -> float:
        return float(json.loads((folder / "run.json").read_text(encoding="utf-8"))["wall_seconds"])

    class Slow(Cut):
        def on_round(self, event: RoundEvent) -> None:
            time.sleep(0.3)
            super().on_round(event)

    with pytest.raises(PowerCut):
        run_experiment(built(base, base_folder, clients_folder, settings), folder, [Slow(2)])
    first = seconds()
    assert first >= 0.6, "a part that was cut off writes down what it took, both waits with it"
    resume_experiment(built(base, base_folder, clients_folder, settings), folder)
    assert first < seconds() <= time.monotonic() - begun, "no second is counted twice"


def test_an_experiment_that_is_run_again_remembers_nothing_of_the_first_time(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {"algorithm.name": "local", "local.optimizer_state": "kept", "rounds.count": 2}
    experiment = built(base, base_folder, clients_folder, settings)
    first, second = (run_experiment(experiment, tmp_path / name) for name in ("first", "second"))
    assert adapter_bytes(first.folder) == adapter_bytes(second.folder)
