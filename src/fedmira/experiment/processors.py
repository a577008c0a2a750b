"""Which processes and threads do a run's work, by the cores and the memory that are free."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from fedmira.clients import LEAST_SHARE, Crew, InTurn, Workers, unsafe_main
from fedmira.config import Config
from fedmira.data import ClientData
from fedmira.errors import ConfigError
from fedmira.methods import Method
from fedmira.model import AdapterKind, count_steps, free_bytes
from fedmira.rounds import cohort_size

__all__ = ["choose_crew", "free_cores"]

_log = logging.getLogger("fedmira")

_SHORT_SECONDS = 60.0
"""Runs that take less on one core are not worth the seconds in which workers begin."""

_PRODUCTS_A_SECOND = 1.0e10
"""Multiplications that a core does in a second of training, with all that stands around them."""

_WORKER_BYTES = 1.5 * 2**30
"""What a worker takes: its libraries, and a pass of a small base."""

_LOOK_SECONDS = 0.2


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
        # A run that goes on with several threads stays one process.
        alone = threads not in ("auto", 1) or unsafe_main(unasked=True) is not None
        workers = 1 if alone else _as_many_as_pay(config, kind, method, list(clients))
    else:
        workers = wanted
        if workers > 1 and (why := unsafe_main() or _problem(kind, method)) is not None:
            raise ConfigError(f"engine.workers is {workers}: {why}")
    most = 1 if workers > 1 else torch.get_num_threads()
    each = threads if threads != "auto" else most if most == 1 else min(most, free_cores())
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


def _as_many_as_pay(
    config: Config, kind: AdapterKind, method: Method, clients: list[ClientData]
) -> int:
    """Workers for a run whose settings leave that open; why there is one is said where it costs."""
    shares = math.ceil(cohort_size(len(clients), config.rounds) / LEAST_SHARE)
    if shares == 1 or _seconds_on_one_core(config, kind, clients) <= _SHORT_SECONDS:
        return 1
    held = free_bytes(kind.base.device) // _WORKER_BYTES
    workers = max(1, int(min(free_cores(), held, shares)))
    if workers > 1 and (why := _problem(kind, method)) is not None:
        if kind.base.device.type == "cpu":
            _log.warning("engine.workers: one process trains, as %s", why)
        return 1
    return workers


def _problem(kind: AdapterKind, method: Method) -> str | None:
    """Why base and method cannot be in several processes, or None."""
    if kind.base.device.type != "cpu":
        return "on a GPU one process trains all clients side by side; set it to 1"
    return Workers.problem(kind, method)


def _seconds_on_one_core(config: Config, kind: AdapterKind, clients: list[ClientData]) -> float:
    """About how long a run trains on one core."""
    cohort = cohort_size(len(clients), config.rounds)
    rows = [row for client in clients for row in client.train]
    length = sum(len(row.prompt) + len(row.response) for row in rows) / max(1, len(rows))
    steps = sum(count_steps(len(client.train), config.local) for client in clients) / len(clients)
    tokens = config.rounds.count * cohort * steps * config.local.batch_size * length
    return 3 * kind.base.num_parameters * tokens / _PRODUCTS_A_SECOND
