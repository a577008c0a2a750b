"""What to do when memory runs out.

How it shows, how much is free, and going on with smaller passes.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from fedmira.errors import RunError

__all__ = [
    "LEAST_TOKENS",
    "PassLimit",
    "PassLimits",
    "free_bytes",
    "most_side_by_side",
    "out_of_memory",
    "total_bytes",
    "within_memory",
]

LEAST_TOKENS = 64
"""No budget is lowered further."""

_SAID = (
    "out of memory",  # CUDA and MPS
    "can't allocate memory",  # Linux
    "not enough memory",  # Windows
    "CUBLAS_STATUS_ALLOC_FAILED",  # CUDA's libraries take workspaces of their own
    "CUDNN_STATUS_ALLOC_FAILED",
)
_log = logging.getLogger("fedmira")

_MOST_CLIENTS = 64
_SHARE_OF_TOTAL = 0.25
_COPIES = 8
"""The most clients of a cohort, the most of all memory for their state, and copies of a number.

Each number of an adapter stands in the state so often: value, gradient, two moments, and while the
optimizer steps up to four copies of them.
"""

Result = TypeVar("Result")


@dataclass(eq=False, slots=True)
class PassLimit:
    """The most tokens that memory was seen to hold in one pass of some work.

    Kept as long as the adapter kind that owns it, a run.

    Attributes:
        tokens: infinite until memory runs out.
    """

    tokens: float = math.inf

    def applied(self, budget: int) -> int:
        """The budget, or the limit where that is lower."""
        return int(min(budget, self.tokens))


@dataclass(frozen=True, eq=False, slots=True)
class PassLimits:
    """A limit for each kind of work, as one takes more memory than the other.

    Attributes:
        train: for passes with gradients.
        measure: for losses without gradients.
        generate: for answers.
    """

    train: PassLimit = field(default_factory=PassLimit)
    measure: PassLimit = field(default_factory=PassLimit)
    generate: PassLimit = field(default_factory=PassLimit)


def within_memory(
    work: Callable[[int], Result], budget: int, limit: PassLimit | None = None
) -> tuple[Result, int]:
    """`work(budget)`, again with half the budget each time memory runs out.

    The result, and the budget that sufficed.

    Args:
        limit: what earlier work of this kind has shown; it is obeyed, and lowered when memory runs
            out.
        work: takes a budget in tokens; raises where memory runs out.
        budget: most tokens in a forward pass.

    Raises:
        RunError: memory runs out even with the least budget.
    """
    limit = PassLimit() if limit is None else limit
    budget = limit.applied(budget)
    while True:
        try:
            return work(budget), budget
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not out_of_memory(error):
                raise
            if budget <= LEAST_TOKENS:
                raise RunError(
                    f"out of memory with {budget} tokens in a forward pass, the least "
                    "there is; lower data.max_length, take a smaller "
                    "model.base, or set engine.recompute = true"
                ) from error
        # Outside the handler, so that the error's traceback no longer holds the tensors of the
        # failed pass.
        budget = max(LEAST_TOKENS, budget // 2)
        limit.tokens = budget
        _log.warning("out of memory: going on with at most %d tokens in a forward pass", budget)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, and nothing about what was computed."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in _SAID)
    )


def free_bytes(device: torch.device) -> float:
    """Memory that is free on the device, or infinity where the system does not say.

    On CUDA, what PyTorch's allocator holds without using it is free too.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + held)
    if device.type != "cpu":
        return math.inf
    return min(_of_meminfo(Path("/proc/meminfo")), _of_group(Path("/sys/fs/cgroup")))


def total_bytes(device: torch.device) -> float:
    """All memory of the device, whoever uses it, or infinity where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return math.inf
    return min(
        _of_meminfo(Path("/proc/meminfo"), "MemTotal"), _limit_of_group(Path("/sys/fs/cgroup"))
    )


def most_side_by_side(entries: int, device: torch.device) -> int:
    """How many clients train in one cohort.

    64, or fewer where large adapters would take too much memory.

    It depends on the machine and not on what is free just now, so that a resumed run forms the same
    cohorts.

    Args:
        entries: float32 numbers in the largest adapter.
        device: where they train.
    """
    room = total_bytes(device) * _SHARE_OF_TOTAL / (_COPIES * 4 * max(entries, 1))
    return max(1, int(min(_MOST_CLIENTS, room)))


def _of_meminfo(path: Path, field: str = "MemAvailable") -> float:
    if not path.is_file():
        return math.inf
    fields = dict(
        line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines() if ":" in line
    )
    return float(fields[field].split()[0]) * 1024 if field in fields else math.inf


def _limit_of_group(folder: Path) -> float:
    limit = folder / "memory.max"
    said = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return math.inf if said == "max" else float(said)


def _of_group(folder: Path) -> float:
    limit, used = _limit_of_group(folder), folder / "memory.current"
    if limit == math.inf or not (folder / "memory.stat").is_file() or not used.is_file():
        return math.inf
    statistics = dict(
        line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    )
    in_use = float(used.read_text(encoding="ascii")) - float(
        statistics.get("inactive_file", 0)
    )  # file pages go when asked for
    return limit - in_use
