"""Processes that are killed at different moments continue to the same bytes.

They are killed with SIGKILL, so that no handler runs.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmira.config import dump_config
from small import PROGRAM, adapter_bytes, command, environment, events_of, make_config, table_of

Moment = Callable[[Path], bool]


def begun(folder: Path) -> bool:
    """The base was evaluated: round 1 is being trained."""
    return any((folder / "checkpoint").glob("round-000000"))


def written_down(number: int) -> Moment:
    """The events of a round are on disk; its checkpoint may be, or be half written."""

    def moment(folder: Path) -> bool:
        path = folder / "events.jsonl"
        return path.exists() and f'"event": "round", "round": {number},' in path.read_text(
            encoding="utf-8"
        )

    return moment


def kept(number: int) -> Moment:
    """The checkpoint of a round is whole."""
    return lambda folder: (folder / "checkpoint" / f"round-{number:06d}").exists()


def kill_at(moment: Moment, folder: Path, *arguments: str | Path, delay_s: float = 0.0) -> None:
    """Start the command and kill it once the moment has come.

    Args:
        delay_s: how long after the moment.
    """
    with subprocess.Popen(
        [PROGRAM, *map(str, arguments)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not moment(folder) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"the run ended before it could be killed: {err}"


def assert_equal_runs(found: Path, expected: Path) -> None:
    assert adapter_bytes(found) == adapter_bytes(expected)
    assert table_of(found, "clients") == table_of(expected, "clients")
    assert table_of(found, "rounds", timing=False) == table_of(expected, "rounds", timing=False)
    assert events_of(found, timing=False) == events_of(expected, timing=False)
    assert (found / "graph.json").read_bytes() == (expected / "graph.json").read_bytes()
    assert not list(found.rglob("*.partial"))


def status_of(folder: Path) -> Any:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"]


def test_a_run_killed_three_times_ends_in_the_same_bytes(command_run: Any, tmp_path: Path) -> None:
    """Some clients a round and a learned graph.

    Killed in round 1, in the middle, and right after a checkpoint.
    """
    folder = tmp_path / "run"
    kill_at(begun, folder, "run", command_run.config, "--output", folder)
    assert status_of(folder) == "running"
    for moment in (written_down(3), kept(5)):
        kill_at(moment, folder, "run", "--resume", "--output", folder)
    ended = command("run", "--resume", "--output", folder, "--format", "json")
    assert ended.returncode == 0, ended.stderr
    assert status_of(folder) == "finished"
    assert_equal_runs(folder, command_run.folder)
    assert json.loads(ended.stdout)["clients"] == json.loads(command_run.ended.stdout)["clients"]


@pytest.mark.parametrize("delay_s", [0.013])
def test_kept_moments_survive_a_kill(
    delay_s: float, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {
        "graph.kind": "random",
        "algorithm.space": "factor",
        "local.optimizer_state": "kept",
        "rounds.participation": 0.6,
        "rounds.count": 5,
        "local.steps": 6,
    }
    config = tmp_path / "config.toml"
    config.write_text(
        dump_config(make_config(base_folder, clients_folder, settings)), encoding="utf-8"
    )
    assert command("run", config, "--output", tmp_path / "straight").returncode == 0
    kill_at(kept(2), tmp_path / "run", "run", config, "--output", tmp_path / "run", delay_s=delay_s)
    assert command("run", "--resume", "--output", tmp_path / "run").returncode == 0
    assert_equal_runs(tmp_path / "run", tmp_path / "straight")


def test_an_interrupt_from_the_keyboard_says_how_to_continue(
    command_run: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen(
        [
            PROGRAM,
            "run",
            str(command_run.config),
            "--set",
            "rounds.count=500",
            "--output",
            str(folder),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with the interrupt ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while not begun(folder) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert "Traceback" not in err and "continue the run with --resume" in err
