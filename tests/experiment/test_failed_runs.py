"""Runs that go wrong: one client, all clients, or an alignment that cannot act.

What was computed is always on disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedmira.adapters import content_hash, digest
from fedmira.errors import (
    AlignmentError,
    ConfigError,
    RoundError,
    RunError,
    RunFolderError,
)
from fedmira.experiment import (
    Experiment,
    build_experiment,
    resume_experiment,
    run_experiment,
)
from fedmira.messages import ClientId, Payload
from fedmira.methods import (
    ServerState,
    Start,
)
from fedmira.model import BaseModel
from fedmira.rounds import sample_clients
from small import (
    CLIENTS,
    adapter_bytes,
    adapters_of,
    events_of,
    make_config,
    table_of,
    with_method_object,
)


def built(
    base: BaseModel, base_folder: Path, clients_folder: Path, settings: Mapping[str, Any]
) -> Experiment:
    return build_experiment(make_config(base_folder, clients_folder, settings), base)


def diverging(experiment: Experiment, clients: Sequence[str], rounds: Sequence[int]) -> Experiment:
    """The experiment with a method whose chosen clients get gradients that are no numbers.

    So training really diverges.

    Args:
        clients: who diverges.
        rounds: when, counted in replies that the server has combined.
    """
    of: Any = type(experiment.config.algorithm)

    class Diverging(of):  # type: ignore[misc]
        def instruct(self, state: ServerState, client: ClientId) -> Payload:
            last = state.numbers.get("last_round")
            round_number = 1 + int(last.max()) if last is not None else 1
            spoiled = client in clients and round_number in rounds
            tensors = super().instruct(state, client).tensors
            return Payload(tensors, {"spoiled": 1.0} if spoiled else {})

        def begin(self, payload: Payload, memory: Payload | None) -> Start:
            start = super().begin(payload, memory)
            if not payload.scalars:
                return start
            return Start(
                start.adapter,
                lambda gradient, _: {name: tensor * math.nan for name, tensor in gradient.items()},
            )

    chosen = experiment.config.algorithm
    given = {key: getattr(chosen, key) for key in chosen.model_fields_set}
    return with_method_object(experiment, Diverging(**given))


def provenance_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return document


def test_one_client_that_diverges_is_an_event_and_the_run_finishes(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    experiment = built(base, base_folder, clients_folder, {"graph.kind": "category"})
    result = run_experiment(diverging(experiment, ["apple-2"], [2]), tmp_path / "run")
    failures = events_of(result.folder, "failure")
    assert [(event["round"], event["client"], event["stage"]) for event in failures] == [
        (2, "apple-2", "train")
    ]
    assert "non-finite" in failures[0]["reason"] and "local.learning_rate" in failures[0]["reason"]
    saved = {
        (event["round"], event["client"]): event["saved_hash"]
        for event in events_of(result.folder, "align")
    }
    loaded = {
        (event["round"], event["client"]): event["loaded_hash"]
        for event in events_of(result.folder, "train")
    }
    assert (2, "apple-2") not in saved and loaded[3, "apple-2"] == saved[1, "apple-2"], (
        "it keeps its adapter"
    )
    assert {row["client"]: row["rounds_trained"] for row in table_of(result.folder, "clients")} == {
        client: "2" if client == "apple-2" else "3" for client in CLIENTS
    }
    assert [row["clients"] for row in table_of(result.folder, "rounds")] == ["5", "4", "5"]
    assert provenance_of(result.folder)["status"] == "finished"
    assert result.report.is_file()


def test_a_client_that_diverges_does_not_touch_the_others(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    experiment = built(base, base_folder, clients_folder, {"algorithm.name": "local"})
    healthy = run_experiment(experiment, tmp_path / "healthy")
    spoiled = run_experiment(diverging(experiment, ["birch-1"], [1]), tmp_path / "spoiled")
    assert len(events_of(spoiled.folder, "failure")) == 3, (
        "local training has no last_round: the client fails in every round"
    )
    for client in CLIENTS:
        expected = experiment.starts[client] if client == "birch-1" else healthy.adapters[client]
        for name, tensor in spoiled.adapters[client].items():
            assert float((tensor - expected[name]).abs().max()) < (
                1e-30 if client == "birch-1" else 5e-5
            )
    row = next(row for row in table_of(spoiled.folder, "clients") if row["client"] == "birch-1")
    assert row["rounds_trained"] == "0" and row["before_align_loss"] == "", (
        "there is no adapter before alignment of a client that never replied"
    )
    assert float(row["after_align_loss"]) == float(row["base_loss"])


def test_when_all_clients_fail_the_last_good_round_is_saved(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {"graph.kind": "category", "rounds.count": 2}
    expected = run_experiment(
        built(base, base_folder, clients_folder, settings), tmp_path / "two rounds"
    )
    experiment = diverging(
        built(base, base_folder, clients_folder, {**settings, "rounds.count": 4}),
        list(CLIENTS),
        [3],
    )
    with pytest.raises(RoundError, match="round 3: none of 5 clients sent a usable reply"):
        run_experiment(experiment, tmp_path / "run")
    folder = tmp_path / "run"
    assert adapter_bytes(folder).keys() == adapter_bytes(expected.folder).keys()
    for client in CLIENTS:
        name = f"adapters/{client}/adapter_model.safetensors"
        assert adapter_bytes(folder)[name] == adapter_bytes(expected.folder)[name]
    provenance = provenance_of(folder)
    assert provenance["status"] == "failed" and provenance["rounds_done"] == 2
    assert provenance["error"].startswith("round 3: none of 5 clients")
    assert len(events_of(folder, "failure")) == 5
    assert "round 3: none of 5 clients" in (folder / "report.html").read_text(encoding="utf-8")
    assert [row["round"] for row in table_of(folder, "rounds")] == ["1", "2"]


def test_a_failed_run_continues_once_the_cause_is_gone(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {"graph.kind": "category", "rounds.count": 3}
    experiment = built(base, base_folder, clients_folder, settings)
    with pytest.raises(RoundError):
        run_experiment(diverging(experiment, list(CLIENTS), [2]), tmp_path / "run")
    mended = diverging(experiment, [], [])  # the same method, whose clients are well again
    resumed = resume_experiment(mended, tmp_path / "run")
    straight = run_experiment(mended, tmp_path / "straight")
    assert adapter_bytes(resumed.folder) == adapter_bytes(straight.folder)
    assert events_of(resumed.folder, timing=False) == events_of(straight.folder, timing=False)
    provenance = provenance_of(resumed.folder)
    assert (provenance["status"], provenance["error"], len(provenance["resumed"])) == (
        "finished",
        None,
        1,
    )


def test_a_learning_rate_beyond_reason_fails_every_client_and_saves_the_start(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    experiment = built(
        base, base_folder, clients_folder, {"local.learning_rate": 1e38, "graph.kind": "uniform"}
    )
    with pytest.raises(RoundError, match=r"learning_rate 1e\+38.*the adapters of round 0 are kept"):
        run_experiment(experiment, tmp_path / "run")
    for client, adapter in adapters_of(tmp_path / "run").items():
        assert all(
            (adapter[name] == tensor.double().numpy()).all()
            for name, tensor in experiment.starts[client].items()
        )
    index = json.loads((tmp_path / "run" / "adapters" / "index.json").read_text(encoding="utf-8"))
    assert {entry["rounds_trained"] for entry in index.values()} == {0}
    assert {entry["sha256"] for entry in index.values()} == {
        content_hash(experiment.starts["apple-1"])
    }


ABSURD = {
    "local.learning_rate": 1e30,
    "adapter.alpha": 1e12,
    "local.steps": 1,
    "algorithm.name": "local",
    "rounds.count": 1,
}
"""One step of such a size that the adapter is finite and the activations overflow float32."""


def test_losses_that_are_no_numbers_fail_the_run_and_break_no_file(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        RunError,
        match=r"5 of 5 clients diverged: their test loss is not finite \(apple-1, .*Lower "
        r"local\.learning_rate",
    ):
        run_experiment(built(base, base_folder, clients_folder, ABSURD), tmp_path / "run")
    for event in events_of(tmp_path / "run", "evaluate"):
        assert (event["test_loss"] is None) == (event["round"] == 1)
    provenance = provenance_of(tmp_path / "run")
    assert provenance["status"] == "failed" and "5 of 5 clients diverged" in provenance["error"]
    index = json.loads((tmp_path / "run" / "adapters" / "index.json").read_text(encoding="utf-8"))
    assert all(set(entry["metrics"]) == {"base_loss"} for entry in index.values()), (
        "a number that is none is left out"
    )
    assert not any(
        math.isfinite(float(row["after_align_loss"]))
        for row in table_of(tmp_path / "run", "clients")
    )
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_round_that_diverged_is_never_the_best(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    experiment = built(base, base_folder, clients_folder, {**ABSURD, "evaluation.select": "best"})
    result = run_experiment(experiment, tmp_path / "run")
    assert {row["best_round"] for row in result.clients} == {0}
    assert all(row["after_align_loss"] == row["base_loss"] for row in result.clients)
    assert {digest(adapter) for adapter in result.adapters.values()} == {
        digest(experiment.starts["apple-1"])
    }


def test_an_alignment_that_pulled_nobody_is_an_error_with_everything_saved(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    """The only edge joins two clients that are not drawn in the one round there is."""
    settings = {"rounds.count": 1, "rounds.participation": 0.6}
    config = make_config(base_folder, clients_folder, settings)
    absent = sorted(
        set(CLIENTS) - set(sample_clients(sorted(CLIENTS), config.rounds, config.seed, 1))
    )
    edges = [{"source": absent[0], "target": absent[1], "weight": 1.0}]
    (tmp_path / "graph.json").write_text(
        json.dumps({"clients": sorted(CLIENTS), "edges": edges}), encoding="utf-8"
    )
    graph = {"graph.kind": "file", "graph.path": str(tmp_path / "graph.json")}
    with pytest.raises(
        AlignmentError,
        match=r"alignment is on, yet in 1 rounds no client was pulled.*choose another graph\.kind",
    ):
        run_experiment(
            built(base, base_folder, clients_folder, {**settings, **graph}), tmp_path / "run"
        )
    alone = run_experiment(
        built(base, base_folder, clients_folder, {**settings, "algorithm.name": "local"}),
        tmp_path / "alone",
    )
    assert adapter_bytes(tmp_path / "run", cards=False) == adapter_bytes(
        alone.folder, cards=False
    ), "what was trained is there"
    provenance = provenance_of(tmp_path / "run")
    assert provenance["status"] == "failed" and "no client was pulled" in provenance["error"]
    assert (tmp_path / "run" / "report.html").is_file() and len(
        table_of(tmp_path / "run", "rounds")
    ) == 1


def test_nothing_is_written_where_settings_cannot_work(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    for settings, message in (
        (
            {"adapter.ranks": {"cherry-1": 2}},
            "there is no client 'cherry-1'; the clients are apple-1",
        ),
        ({"data.max_length": 4096}, "data.max_length is 4096, but .* reads at most 128 tokens"),
        (
            {"rounds.count": 1},
            "graph.warmup_rounds is 1 and rounds.count 1: the graph would never act",
        ),
        (
            {"rounds.participation": 0.1, "algorithm.neighbours": "fresh"},
            "1 client a round has no neighbours",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            built(base, base_folder, clients_folder, settings)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_folder_is_left_as_it_is(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RunFolderError, match="never overwritten"):
        run_experiment(built(base, base_folder, clients_folder, {}), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
