"""Which processes and threads do a run's work, by the cores and the memory that are free."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from fedmira.clients import Crew, InTurn, Workers, unsafe_main
from fedmira.config import Config
from fedmira.data import ClientData
from fedmira.errors import ConfigError
from fedmira.methods import Method
from fedmira.model import AdapterKind, count_steps, free_bytes
from fedmira.rounds import cohort_size

__all__ = ["choose_crew", "free_cores"]

_SHORT_SECONDS = 60.0
"""Runs that take less on one core are not worth the seconds in which workers begin."""

_PRODUCTS_A_SECOND = 1.0e10
"""Multiplications that a core does in a second of training, with all that stands around them."""

_WORKER_BYTES = 1.5 * 2**30
"""What a worker takes: its libraries, and a pass of a small base."""

_LOOK_SECONDS = 0.2
_LEAST_CLIENTS = 8
"""Clients of a round, below which there are not two shares."""


def choose_crew(
    config: Config,
    kind: AdapterKind,
    method: Method,
    clients: Iterable[ClientData],
    threads_before: int | None = None,
) -> Crew:
    """The processes and threads of a run, as set or by what is free.

    Args:
        config: the resolved settings.
        kind: the adapters, on their base.
        method: whose client half the processes run.
        clients: all clients of the run.
        threads_before: of the part of the run that is continued, so that it goes on with the same
            bits.

    Raises:
        ConfigError: several workers are asked for and cannot be.
    """
    wanted, threads = config.engine.workers, config.engine.threads
    if threads == "auto" and threads_before is not None:
        threads = threads_before
    if wanted == "auto":
        seconds, cohort = _seconds_on_one_core(config, kind, list(clients))
        held = int(free_bytes(kind.base.device) // _WORKER_BYTES) if seconds > 0 else 1
        worth = seconds > _SHORT_SECONDS and cohort >= _LEAST_CLIENTS
        known = threads in ("auto", 1)  # a run that goes on with several threads stays one process
        workers = 1
        if worth and known and _why_not(kind, method, unasked=True) is None:
            workers = max(1, min(free_cores(), held, math.ceil(cohort / 4)))
    else:
        workers = wanted
        if workers > 1 and (why := _why_not(kind, method, unasked=False)) is not None:
            raise ConfigError(f"engine.workers is {workers}: {why}")
    if threads != "auto":
        each = threads
    else:
        each = 1 if workers > 1 else min(torch.get_num_threads(), free_cores())
    return InTurn(each) if workers == 1 else Workers(workers, each)


def free_cores() -> int:
    """Cores that this process may use and that no other program keeps busy; at least 1.

    They are watched for a fifth of a second.
    """
    allowed = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
    if len(allowed) == 1:
        return 1
    busy: list[float] = psutil.cpu_percent(interval=_LOOK_SECONDS, percpu=True)
    idle = sum(100.0 - busy[core] for core in allowed if core < len(busy)) / 100.0
    return max(1, min(math.floor(idle + 0.4), _quota(Path("/sys/fs/cgroup/cpu.max"))))


def _quota(path: Path) -> int:
    """Cores that a control group may use, as a container's limit; all where none is set."""
    said = path.read_text(encoding="ascii").split() if path.is_file() else ["max"]
    if said[0] == "max":
        return os.cpu_count() or 1
    return max(1, int(said[0]) // int(said[1]))


def _why_not(kind: AdapterKind, method: Method, *, unasked: bool) -> str | None:
    """Why there cannot be several workers, or None.

    Args:
        kind: the adapters, on their base.
        method: whose client half they would run.
        unasked: whether nobody asked for them, so that no doubt may be left.
    """
    if kind.base.device.type != "cpu":
        return "on a GPU one process trains all clients side by side; set it to 1"
    return unsafe_main(unasked=unasked) or Workers.problem(kind, method)


def _seconds_on_one_core(
    config: Config, kind: AdapterKind, clients: list[ClientData]
) -> tuple[float, int]:
    """About how long a run trains on one core, and the clients of a round."""
    cohort = cohort_size(len(clients), config.rounds)
    rows = [row for client in clients for row in client.train]
    length = sum(len(row.prompt) + len(row.response) for row in rows) / max(1, len(rows))
    steps = sum(count_steps(len(client.train), config.local) for client in clients) / len(clients)
    tokens = config.rounds.count * cohort * steps * config.local.batch_size * length
    return 3 * kind.base.num_parameters * tokens / _PRODUCTS_A_SECOND, cohort
