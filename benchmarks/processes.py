"""Runs a script as a process of its own and measures the peak memory of all its processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["Failed", "run_script"]


class Failed(Exception):
    """The script ended with an error; the message is its last line."""


def run_script(
    script: Path, arguments: list[str], out: Path, threads: int, sample_memory: bool = False
) -> dict[str, Any]:
    """Run a script that writes OUT/result.json, and return that.

    Args:
        sample_memory: add `peak_memory_bytes`, the largest sum of proportional set sizes over the
            script's processes, and the largest number of them, `processes`. Looking costs time, so
            do not use the script's timings then.

    Raises:
        Failed: it ended with an error or wrote nothing.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").unlink(missing_ok=True)
    log = out / "log.txt"
    environment = {
        **os.environ,
        **{
            name: str(threads)
            for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        },
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(script.parent),
        "FEDMIRA_CACHE": str(
            out.parent / "cache"
        ),  # of this benchmark alone, so that first use can be timed
        "BENCHMARK_STARTED": repr(time.time()),
    }
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        peak = _watch(process) if sample_memory else {}
        code = process.wait()
    if code or not (out / "result.json").is_file():
        lines = [
            line
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.strip()
        ]
        raise Failed(f"ended with {code}: {lines[-1] if lines else 'no output'}; see {log}")
    return {**json.loads((out / "result.json").read_text(encoding="utf-8")), **peak}


def _watch(process: subprocess.Popen[bytes], interval: float = 0.05) -> dict[str, int]:
    peak = most = 0
    family = {process.pid}
    while process.poll() is None:
        family = _grow(family)
        sizes = [_memory(pid) for pid in family]
        peak, most = max(peak, sum(sizes)), max(most, sum(size > 0 for size in sizes))
        time.sleep(interval)
    return {"peak_memory_bytes": peak, "processes": most}


def _grow(family: set[int]) -> set[int]:
    """With all children of known processes.

    A child stays known when its parent is gone and it lives on.
    """
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            stat = _read(entry / "stat")
            if stat:
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    alive = family & set(parents)
    while new := {pid for pid, parent in parents.items() if parent in alive} - alive:
        alive |= new
    return alive


def _memory(pid: int) -> int:
    for line in _read(Path(f"/proc/{pid}/smaps_rollup")).splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # the process ended between two looks
        return ""
