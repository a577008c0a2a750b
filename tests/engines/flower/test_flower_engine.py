"""A federation through Flower's own messages: the same run as in one process, and what becomes of nodes that fail."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr", reason="Flower is not installed; pip install 'fedmira[flower]'")

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from federation import CLIENTS, make_config
from fedmira.api import run
from fedmira.federation import run_federation
from loopback import LoopbackGrid


def nodes_of(data: Path, memory: Path, names: Any = CLIENTS) -> dict[int, Mapping[str, Any]]:
    return {100 + i: {"name": name, "data-path": str(data), "memory": str(memory)} for i, name in enumerate(names)}


@pytest.mark.parametrize("settings", [{}, {"algorithm.name": "ditto"}, {"algorithm.safeguard": True, "local.optimizer_state": "kept"}])
def test_a_federation_ends_with_the_adapters_of_the_run_in_one_process(
    settings: dict[str, Any], base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(base_folder, clients_folder, {**settings, "rounds.participation": 0.6, "federation.nodes": len(CLIENTS)})
    grid = LoopbackGrid(config, nodes_of(clients_folder, tmp_path / "memory"))
    apart = run_federation(config, grid, tmp_path / "apart", resume=False)
    together = run(config, output=tmp_path / "together")
    for client, adapter in together.adapters.items():
        for name, tensor in adapter.items():
            assert torch.allclose(tensor, apart.adapters[client][name], atol=1e-4)
    assert (tmp_path / "apart" / "report.html").is_file()
