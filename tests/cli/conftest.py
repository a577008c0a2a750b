"""One run through the installed command that several files read.

And the command line inside this process, for what needs no process.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedmira.config import dump_config
from small import Ended, call_main, command, make_config

SETTINGS: dict[str, Any] = {
    "rounds.count": 6,
    "rounds.participation": 0.6,
    "evaluation.every": 2,
    "evaluation.rouge": True,
    "local.steps": 4,
}
"""A learned graph, three of five clients a round, and rounds long enough to be killed in."""


@dataclass(frozen=True)
class CommandRun:
    """A finished `fedmira run CONFIG --output FOLDER --format json`."""

    config: Path
    folder: Path
    ended: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def config_file(
    base_folder: Path, clients_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("cli") / "config.toml"
    path.write_text(
        dump_config(make_config(base_folder, clients_folder, SETTINGS)), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def command_run(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> CommandRun:
    folder = tmp_path_factory.mktemp("cli-run") / "run"
    ended = command("run", config_file, "--output", folder, "--format", "json")
    assert ended.returncode == 0, ended.stderr
    return CommandRun(config_file, folder, ended)


@pytest.fixture
def fedmira() -> Callable[..., Ended]:
    """Calls the command line's own `main` in this process."""
    return call_main
