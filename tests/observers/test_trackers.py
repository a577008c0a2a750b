"""Trackers with the real packages, without a network; what they wrote is read back."""

from __future__ import annotations

import importlib.util
import math
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from fedmira.errors import ConfigError
from fedmira.observers import (
    TRACKERS,
    EndEvent,
    EvaluationEvent,
    Observer,
    RoundEvent,
    RunFacts,
    StartEvent,
    tracker,
)

FACTS = RunFacts("0123456789abcdef", "first", {"rounds.count": 2, "algorithm.name": "mira"})
LOSSES = {1: 2.5, 2: 1.25}

# The libraries warn of much that is none of our doing.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a tracker wants to reach {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


def wanted(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed; `make trackers` runs this test")


def watch(observer: Observer, folder: Path, rounds: tuple[int, ...], resumed: int | None) -> None:
    """Tell a tracker of a run with these rounds."""
    observer.on_start(StartEvent(FACTS, ("a", "b"), 2, folder, resumed))
    for number in rounds:
        loss = LOSSES[number]
        observer.on_evaluation(EvaluationEvent(FACTS, number, {"a": loss}, {}, loss, None))
        figures = {"round": number, "train_loss": loss / 2, "pull": None, "test_loss": math.nan}
        observer.on_round(RoundEvent(FACTS, number, figures))
    summary = {"after_align_loss": {"mean": 1.0}} if 2 in rounds else {}
    status = "finished" if 2 in rounds else "stopped"
    observer.on_end(EndEvent(FACTS, status, None, summary, folder))


@pytest.mark.parametrize("name", TRACKERS)
def test_a_library_that_is_missing_is_named_with_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmira.observers.tracked.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed.*fedmira\[{name}\]"):
        tracker(name)


def test_an_unknown_tracker_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=f"no tracker 'tensor'.*{', '.join(TRACKERS)}"):
        tracker("tensor")


def test_tensorboard_reads_back_what_was_written_in_two_parts(tmp_path: Path) -> None:
    wanted("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for rounds, resumed in (((1,), None), ((2,), 1)):
        watch(tracker("tensorboard", str(tmp_path)), tmp_path, rounds, resumed)
    read = EventAccumulator(str(tmp_path / "first"))
    read.Reload()
    found = [(event.step, event.value) for event in read.Scalars("evaluation/test_loss")]
    assert found == list(LOSSES.items())
    found = [(event.step, event.value) for event in read.Scalars("round/train_loss")]
    assert found == [(number, loss / 2) for number, loss in LOSSES.items()]
    assert set(read.Tags()["scalars"]) == {
        "evaluation/test_loss",
        "round/train_loss",
        "summary/after_align_loss",
    }, "what is missing or no number is left out"


def test_mlflow_reads_back_one_run_of_two_parts(tmp_path: Path) -> None:
    wanted("mlflow")
    from mlflow import MlflowClient

    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for rounds, resumed in (((1,), None), ((2,), 1)):
        watch(tracker("mlflow", address), tmp_path, rounds, resumed)
    client = MlflowClient(tracking_uri=address)
    group = client.get_experiment_by_name("fedmira")
    (run,) = client.search_runs([group.experiment_id])
    history = client.get_metric_history(run.info.run_id, "evaluation/test_loss")
    assert {entry.step: entry.value for entry in history} == LOSSES
    assert run.data.params == {"rounds.count": "2", "algorithm.name": "mira"}
    assert run.info.status == "FINISHED" and run.data.tags["fedmira_status"] == "finished"


def test_wandb_keeps_a_run_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted("wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    from fedmira.observers import WandB

    watch(WandB("mine", folder=tmp_path), tmp_path, (1, 2), None)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert FACTS.id in file.name
    until = time.monotonic() + 30  # W&B's own process writes the file out a moment later
    while b"summary/after_align_loss" not in (content := file.read_bytes()):
        assert time.monotonic() < until, "the run was not written out"
        time.sleep(0.1)
    assert b"evaluation/test_loss" in content and b"2.5" in content and b"1.25" in content


def test_trackio_keeps_a_run_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio.sqlite_storage
    import trackio.utils

    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    watch(tracker("trackio", "mine"), tmp_path, (1, 2), None)
    logs = trackio.sqlite_storage.SQLiteStorage.get_logs("mine", f"first-{FACTS.id[:8]}")
    found = {
        entry["step"]: entry["evaluation/test_loss"]
        for entry in logs
        if "evaluation/test_loss" in entry
    }
    assert found == LOSSES
