"""Worker processes: the same bits as one process, whoever dies, and nothing left behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fedmira.clients import InTurn, Share, Workers, share_size
from fedmira.config import with_method
from fedmira.data import ClientData, EncodedExample
from fedmira.errors import ConfigError, RunError
from fedmira.experiment import build_experiment, run_experiment
from fedmira.model import LoraKind, find_targets
from for_workers import Dying, Fails, Told
from small import PROGRAM, adapter_bytes, environment, make_config, write_base, write_clients
from tiny import tiny_base

SHARES = {"engine.token_budget": 64}  # 5 clients make two shares


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and the rows of five clients, on disk."""
    place = tmp_path_factory.mktemp("workers")
    return write_base(place / "base"), write_clients(place / "clients")


def run_with(
    ground: tuple[Path, Path], output: Path, workers: int, settings: dict[str, Any]
) -> tuple[dict[str, bytes], str]:
    """The saved adapters and the table of clients of a run."""
    config = make_config(*ground, {**SHARES, "engine.workers": workers, **settings})
    result = run_experiment(build_experiment(config), output)
    table = (result.folder / "metrics" / "clients.csv").read_text(encoding="utf-8")
    return adapter_bytes(result.folder), table


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm.name": "two-level", "evaluation.every": 1, "evaluation.rouge": True},
        {"algorithm.name": "mira", "algorithm.safeguard": True},
        {"algorithm.name": "local", "local.optimizer_state": "kept"},
        {"algorithm.name": "fedavg", "engine.wire": "int8"},
    ],
    ids=lambda settings: str(settings["algorithm.name"]),
)
def test_several_workers_give_the_bits_of_one_process(
    ground: tuple[Path, Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    alone, table = run_with(ground, tmp_path / "one", 1, {"engine.threads": 1, **settings})
    together, same = run_with(ground, tmp_path / "more", 3, settings)
    assert together == alone and same == table


def test_the_run_folder_says_how_many_processes_and_threads_there_were(
    ground: tuple[Path, Path], tmp_path: Path
) -> None:
    run_with(ground, tmp_path / "run", 2, {"algorithm.name": "local", "rounds.count": 1})
    text = (tmp_path / "run" / "run.json").read_text(encoding="utf-8")
    assert '"workers": 2' in text and '"threads": 1' in text


def test_a_worker_that_dies_costs_a_line_in_the_log_and_no_bit(
    ground: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flag = tmp_path / "flag"
    flag.write_text("", encoding="ascii")
    expected, _ = run_dying(ground, tmp_path / "whole", flag)
    flag.write_text("once", encoding="ascii")
    with caplog.at_level(logging.WARNING, "fedmira"):
        found, _ = run_dying(ground, tmp_path / "killed", flag)
    assert found == expected
    assert "a worker process died" in caplog.text and "apple-1" in caplog.text


def test_workers_that_die_again_end_the_run_with_the_names_of_their_clients(
    ground: tuple[Path, Path], tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    flag.write_text("\n".join("again" for _ in range(20)), encoding="ascii")
    with pytest.raises(RunError, match=r"died twice .*apple-1.*engine\.workers"):
        run_dying(ground, tmp_path / "run", flag)


def run_dying(
    ground: tuple[Path, Path], output: Path, flag: Path
) -> tuple[dict[str, bytes], object]:
    """A run of two rounds whose clients end their process while the flag has lines."""
    settings = {**SHARES, "engine.workers": 2, "rounds.count": 2}
    config = with_method(make_config(*ground, settings), Dying(flag=str(flag)))
    result = run_experiment(build_experiment(config), output)
    return adapter_bytes(result.folder), result


def test_what_a_worker_logs_and_what_it_raises_reach_whoever_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = tiny_base()
    kind = LoraKind(base, find_targets(base.model, ()), alpha=4.0)
    crew = Workers(2)
    try:
        with caplog.at_level(logging.WARNING, "fedmira"):
            found = list(crew.do(kind, [Share([str(i)], i, lambda i=i: Told(i)) for i in range(5)]))
        assert found == [0, 1, 4, 9, 16]
        assert sorted(caplog.messages) == [f"share {i}" for i in range(5)]
        with pytest.raises(RunError, match="share 3 of LoraKind"):
            list(crew.do(kind, [Share([str(i)], i, lambda i=i: Fails(i)) for i in range(4)]))
    finally:
        crew.release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")
def test_workers_end_with_a_killed_run(ground: tuple[Path, Path], tmp_path: Path) -> None:
    base, clients = ground
    settings = {
        **SHARES,
        "model.base": str(base),
        "data.source": "jsonl",
        "data.path": str(clients),
        "data.prompt": "plain",
        "data.max_length": 64,
        "algorithm.name": "local",
        "local.steps": 5,
        "rounds.count": 5000,
        "engine.workers": 2,
        "evaluation.rouge": "false",
    }
    pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [PROGRAM, "run", *pairs, "--output", str(tmp_path / "r")]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE) as process:

        def begun() -> list[psutil.Process]:
            assert process.poll() is None, "the run ended by itself"
            return [each for each in descendants(process.pid) if "spawn" in line_of(each)]

        workers = wait_for(begun)
        process.send_signal(signal.SIGKILL)
        assert len(workers) >= 2
        wait_for(lambda: not any(worker.is_running() and alive(worker) for worker in workers))


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def line_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for(what: Any) -> Any:
    """What it gives once that is true."""
    for _ in range(600):
        if found := what():
            time.sleep(0.5)
            return what() or found
        time.sleep(0.2)
    raise AssertionError("nothing in two minutes")


def test_a_program_without_a_guard_is_told_before_it_starts_itself_again(
    ground: tuple[Path, Path], tmp_path: Path
) -> None:
    base, clients = ground
    program = tmp_path / "program.py"
    program.write_text(
        "import fedmira\n"
        f"fedmira.run(method='local', clients={str(clients)!r}, base={str(base)!r},\n"
        "    settings={'data.source': 'jsonl', 'data.prompt': 'plain', 'data.max_length': 64,\n"
        "              'engine.workers': 2, 'engine.token_budget': 64, 'rounds.count': 1},\n"
        f"    output={str(tmp_path / 'run')!r})\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert '`if __name__ == "__main__":`' in done.stderr and "engine.workers" in done.stderr


def test_a_method_that_cannot_be_sent_is_named_before_anything_trains(
    ground: tuple[Path, Path],
) -> None:
    class Inside(Dying):
        """A class that no other process can import."""

    config = with_method(make_config(*ground, {"engine.workers": 2}), Inside(flag="x"))
    with pytest.raises(ConfigError, match=r"engine\.workers is 2: the method 'inside'"):
        build_experiment(config)


@pytest.mark.parametrize(
    ("lengths", "batch", "budget", "most", "expected"),
    [
        ([50] * 9, 4, 400, 64, 4),  # 200 tokens in a step: two clients fill a pass
        ([10] * 9, 4, 400, 64, 10),  # 40 in a step
        ([10] * 9, 4, 4000, 64, 64),
        ([10] * 9, 4, 400, 3, 3),  # memory holds no more
        ([], 4, 400, 64, 4),
    ],
)
def test_a_share_fills_a_pass_and_no_more(
    lengths: list[int], batch: int, budget: int, most: int, expected: int
) -> None:
    rows = tuple(EncodedExample((0,) * (length - 1), (1,)) for length in lengths)
    client = ClientData("c", "task", "category", rows, (), (), ())
    assert share_size([client], batch, budget, most) == expected


def test_work_in_this_process_leaves_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    base = tiny_base()
    kind = LoraKind(base, find_targets(base.model, ()), alpha=4.0)
    shares = [Share(["a"], 1.0, lambda: lambda _: torch.get_num_threads())]
    assert list(InTurn(before + 1).do(kind, shares)) == [before + 1]
    assert torch.get_num_threads() == before
