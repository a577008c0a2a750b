"""Two small runs on one base and the same rows, which several files use."""

from __future__ import annotations

from pathlib import Path

import pytest

from small import make_run


@pytest.fixture(scope="session")
def shared_run(
    base_folder: Path, clients_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("using") / "shared"
    settings = {"algorithm.name": "fedit-finetune", "data.prompt": "alpaca"}
    return make_run(base_folder, clients_folder, output, settings)


@pytest.fixture(scope="session")
def lone_run(
    base_folder: Path, clients_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("using") / "alone"
    settings = {"algorithm.name": "local", "data.prompt": "alpaca", "adapter.rslora": True}
    return make_run(base_folder, clients_folder, output, settings)
