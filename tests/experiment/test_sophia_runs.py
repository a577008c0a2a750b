"""A run with Sophia as local optimizer: what is logged, what travels, what the client keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedmira.experiment import build_experiment, run_experiment
from fedmira.model import BaseModel
from small import CLIENTS, adapter_bytes, events_of, make_config

SOPHIA: dict[str, Any] = {
    "algorithm.name": "fedavg",
    "local.optimizer": "sophia",
    "local.optimizer_state": "kept",
    "local.sophia_refresh": 2,
}


def test_the_share_of_clipped_entries_is_logged_and_curvature_never_travels(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    experiment = build_experiment(make_config(base_folder, clients_folder, SOPHIA), base)
    run_experiment(experiment, tmp_path / "run")
    events = events_of(tmp_path / "run", "train")
    start = next(iter(experiment.starts.values()))
    assert len(events) == 3 * len(CLIENTS)
    for event in events:
        assert 0 < event["clip_share"] <= 1
        assert (
            event["bytes_up"]
            == event["bytes_down"]
            == sum(tensor.numel() * 4 for tensor in start.values())
        )


def test_other_optimizers_log_no_share(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(
        base_folder, clients_folder, {"algorithm.name": "local", "rounds.count": 1}
    )
    run_experiment(build_experiment(config, base), tmp_path / "run")
    assert all("clip_share" not in event for event in events_of(tmp_path / "run", "train"))


@pytest.mark.parametrize("state", ["fresh", "kept"])
def test_a_second_run_gives_the_same_adapters(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path, state: str
) -> None:
    config = make_config(base_folder, clients_folder, {**SOPHIA, "local.optimizer_state": state})
    for name in ("one", "two"):
        run_experiment(build_experiment(config, base), tmp_path / name)
    assert adapter_bytes(tmp_path / "one") == adapter_bytes(tmp_path / "two")
