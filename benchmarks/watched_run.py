"""Runs `fedmira run` on many small clients in a process of its own and watches it.

Time, memory and open files are noted as each round ends.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmira.data.sources.demo import demo_tasks

__all__ = ["Sample", "Watched", "run_watched", "write_clients"]

ROWS = 6
"""Of a client, test rows included."""

SETTINGS: dict[str, Any] = {
    "data.source": "jsonl",
    "data.max_length": 96,
    "data.train_fraction": 0.67,
    "data.test_rows": 1,
    "adapter.rank": 8,
    "local.steps": 2,
    "local.batch_size": 4,
    "evaluation.every": 0,
    "evaluation.rouge": False,
    "model.device": "cpu",
}


@dataclass(frozen=True)
class Sample:
    """What the process looked like as a round ended (0: the base was evaluated)."""

    round: int
    seconds: float
    cpu_seconds: float
    resident_bytes: int
    peak_bytes: int
    open_files: int
    mapped_files: int


@dataclass
class Watched:
    """A run: its samples by round, and the whole of it."""

    samples: list[Sample] = field(default_factory=list)
    total_seconds: float = 0.0
    total_cpu_seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def round_seconds(self) -> list[float]:
        """From the end of one round to the end of the next.

        Training, combining, writing down. Of rounds 2, 3, ...
        """
        return [
            after.seconds - before.seconds
            for before, after in zip(self.samples[1:], self.samples[2:], strict=False)
        ]


def write_clients(path: Path, clients: int) -> Path:
    """One JSON Lines file of so many clients, a few rows of one of the demo's tasks each."""
    tasks = demo_tasks()
    with path.open("w", encoding="utf-8") as file:
        for number in range(clients):
            task = tasks[number % len(tasks)]
            pool = [*task.examples, *(task.test or ())]
            for example in random.Random(number).sample(pool, ROWS):
                row = {"client": f"{task.name}-{number:05d}", "category": task.category}
                row |= {
                    "instruction": example.instruction,
                    "input": example.input,
                    "output": example.output,
                }
                file.write(json.dumps(row) + "\n")
    return path


def run_watched(
    data: Path,
    output: Path,
    settings: Mapping[str, Any],
    threads: int = 1,
    surroundings: Mapping[str, str] | None = None,
) -> Watched:
    """Run with the bundled base; `settings` are dotted keys over SETTINGS.

    Args:
        data: the rows.
        output: the run folder.
        settings: dotted keys over SETTINGS; None leaves one of those out.
        threads: most of PyTorch.
        surroundings: environment variables over those at hand, such as PYTHONPATH.

    Raises:
        RuntimeError: the run failed; the message is what it said last.
    """
    chosen = {**SETTINGS, "data.path": str(data), **settings}
    command = [str(Path(sys.executable).with_name("fedmira")), "run", "--output", str(output)]
    for key, value in chosen.items():
        if value is None:
            continue
        command += ["--set", f"{key}={json.dumps(value)}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **(surroundings or {}),
    }
    watched, begun, lines = Watched(), time.perf_counter(), []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip())
            number = _round_of(line)
            if number is not None:
                watched.samples.append(_sample(process.pid, number, time.perf_counter() - begun))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    watched.total_seconds = time.perf_counter() - begun
    watched.total_cpu_seconds = usage.ru_utime + usage.ru_stime
    watched.peak_bytes = usage.ru_maxrss * 1024
    if process.returncode:
        raise RuntimeError(f"fedmira ended with {process.returncode}: {' | '.join(lines[-3:])}")
    return watched


def _round_of(line: str) -> int | None:
    """The round that a line of progress says has ended."""
    if "the base has test loss" in line:
        return 0
    found = re.search(r": round (\d+)/\d+ ", line)
    return int(found[1]) if found else None


def _sample(process: int, number: int, seconds: float) -> Sample:
    folder = Path("/proc") / str(process)
    facts = dict(
        line.split(":", 1) for line in (folder / "status").read_text(encoding="utf-8").splitlines()
    )
    resident, peak = (1024 * int(facts[key].split()[0]) for key in ("VmRSS", "VmHWM"))
    maps = {
        line.split(maxsplit=5)[5]
        for line in (folder / "maps").read_text(encoding="utf-8").splitlines()
        if " /" in line
    }
    spent = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]
    processor = sum(map(int, spent)) / os.sysconf("SC_CLK_TCK")
    return Sample(
        number, seconds, processor, resident, peak, len(os.listdir(folder / "fd")), len(maps)
    )
