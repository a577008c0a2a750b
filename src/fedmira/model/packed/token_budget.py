"""How many tokens one forward pass may hold.

Chosen by a short trial on the machine, bounded by its memory.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedmira.config import cache_folder
from fedmira.model.base.known import keep_known, read_known
from fedmira.model.base.memory import LEAST_TOKENS, free_bytes, out_of_memory
from fedmira.model.base.types import BaseModel, TargetModule
from fedmira.model.lora.branch import LoraBranch
from fedmira.model.lora.stack import StackedAdapters, start_adapter
from fedmira.model.packed.passes import response_losses

__all__ = ["choose_token_budget", "machine_name", "usual_token_budget"]

_CANDIDATES = {"cpu": (512, 1024, 2048, 4096), "other": (4096, 8192, 16384, 32768, 65536)}
_USUAL = {"cpu": 2048, "other": 16384}
_SHARE_OF_MEMORY = 0.4
_TRIAL_SECONDS = 1.5
"""Of a candidate: once it has taken so long, it is not tried again."""

_LEAST_TRIED = 3
"""Candidates without which a trial says too little to be kept."""

_MOST_CLIENTS = 64


@dataclass(frozen=True, slots=True)
class _Row:
    prompt: tuple[int, ...]
    response: tuple[int, ...]


def choose_token_budget(
    base: BaseModel, targets: Sequence[TargetModule], step_tokens: float = 0.0, cohort: int = 1
) -> int:
    """The number of tokens that this base trains fastest with on this machine.

    It is bounded by the machine's free memory.

    The trial's outcome is kept in the cache folder, so that later runs group tokens alike and give
    the same bits. Where nothing can be kept there, the usual number for the device is taken.

    Args:
        base: the frozen base.
        targets: the linear layers that carry adapters, in the model's order.
        step_tokens: of a client's local step; 0 has a pass hold one client.
        cohort: most clients of a pass.
    """
    candidates = _CANDIDATES[_kind(base)]
    shares = tuple(_clients_of(candidate, step_tokens, cohort) for candidate in candidates)
    folder, key = cache_folder(), _key(base, targets, shares)
    if folder is None:
        return usual_token_budget(base)
    path = folder / "token_budget.json"
    found = read_known(path, _budget, "token budgets are tried out again").get(key)
    if found is None:
        tried = _try_out(base, targets, dict(zip(candidates, shares, strict=True)))
        found = _best(tried)
        if found is None:
            return (
                LEAST_TOKENS  # not even the first trial had memory enough; another time it may have
            )
        if len(tried.seconds) >= _LEAST_TRIED:
            known = read_known(path, _budget, "token budgets are tried out again")
            keep_known(path, {**known, key: found}, "the token budget will be tried out again")
    return _bounded(found[0], found[1], free_bytes(base.device))


def _budget(kept: Sequence[float]) -> tuple[int, float]:
    budget, size = kept
    return int(budget), float(size)


def usual_token_budget(base: BaseModel) -> int:
    """The number of tokens that suits most machines with a device like the base's."""
    return _USUAL[_kind(base)]


def _kind(base: BaseModel) -> str:
    return "cpu" if base.device.type == "cpu" else "other"


def _clients_of(candidate: int, step_tokens: float, cohort: int) -> int:
    """Clients of a pass, as a power of two: data that differ a little share a trial."""
    most = min(cohort, _MOST_CLIENTS, candidate / step_tokens if step_tokens else 1)
    return 1 << int(math.log2(max(1, most)))


@dataclass(frozen=True, slots=True)
class _Trial:
    """Seconds a token of each candidate for which memory sufficed, and bytes that it remembers."""

    seconds: Mapping[int, float]
    bytes_per_token: float


def _best(trial: _Trial) -> tuple[int, float] | None:
    """The least candidate within 5 % of the fastest, and the bytes it remembers of a token.

    Those are the bytes that training remembers; None without memory for any candidate.
    """
    fastest = min(trial.seconds.values(), default=math.inf)
    for candidate, spent in trial.seconds.items():
        if spent <= 1.05 * fastest:
            return candidate, trial.bytes_per_token
    return None


def _try_out(
    base: BaseModel, targets: Sequence[TargetModule], candidates: Mapping[int, int]
) -> _Trial:
    """Passes of each candidate, with as many clients as it says; only lack of memory ends it.

    On a processor its own clock counts, so that other programs cut nothing short.
    """
    draw = torch.Generator().manual_seed(0)
    limit = min(base.num_embeddings, len(base.tokenizer))
    length = min(128, (base.max_positions or 128) - 1)
    row = _Row(
        tuple(torch.randint(0, limit, (length - length // 8,), generator=draw).tolist()),
        (0,) * (length // 8 + 1),
    )
    clients = max(candidates.values())
    start = start_adapter(targets, 8, 0)
    stacked = StackedAdapters(targets, [start] * clients, [1.0] * clients, base.device)
    seconds: dict[int, float] = {}
    remembered = 0.0
    with LoraBranch(base.model, stacked) as branch:
        for candidate, shares in candidates.items():
            count = max(1, candidate // length)
            rows = [
                _Row((i % limit, i // limit % limit, *row.prompt[2:]), row.response)
                for i in range(count)
            ]  # little is shared
            batches = [(k, rows[k::shares]) for k in range(min(shares, count))]
            try:
                if not seconds:
                    remembered = _pass(base, branch, batches, candidate, count=True) / (
                        len(rows) * length
                    )
                spent: list[float] = []
                while len(spent) < 3 and sum(spent) <= _TRIAL_SECONDS:  # noqa: PLR2004
                    begun = _now(base.device)
                    _pass(base, branch, batches, candidate)
                    spent.append(_now(base.device) - begun)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                break
            seconds[candidate] = min(spent) / (len(rows) * length)
    return _Trial(seconds, remembered)


def _now(device: torch.device) -> float:
    """Seconds of the clock by which a device's work is measured, once it has done it."""
    if device.type == "cpu":
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _pass(
    base: BaseModel,
    branch: LoraBranch,
    batches: Sequence[tuple[int, Sequence[_Row]]],
    budget: int,
    count: bool = False,
) -> float:
    """Forward and backward over the rows of each client.

    With `count` the bytes that were remembered in between.
    """
    sizes: dict[int, int] = {}
    frozen = {parameter.untyped_storage().data_ptr() for parameter in base.model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in frozen:
            sizes[place] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = sum(len(row.prompt) + len(row.response) for _, rows in batches for row in rows)
    for losses in response_losses(base, branch, batches, budget + tokens):
        losses.values.sum().backward()  # type: ignore[no-untyped-call]
    if count:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            for losses in response_losses(base, branch, batches, 10**9):
                losses.values.sum().backward()  # type: ignore[no-untyped-call]
    return float(sum(sizes.values()))


def _bounded(budget: int, bytes_per_token: float, free: float) -> int:
    """The budget, halved until it fits into a share of the free memory.

    What must fit is what training remembers.
    """
    while budget > LEAST_TOKENS and budget * bytes_per_token > _SHARE_OF_MEMORY * free:
        budget //= 2
    return max(budget, LEAST_TOKENS)


def _key(base: BaseModel, targets: Sequence[TargetModule], shares: Sequence[int]) -> str:
    names = [target.name for target in targets]
    compiled = any("forward" in vars(module) for module in base.model.modules())
    parts = (
        machine_name(base.device),
        torch.get_num_threads(),
        torch.__version__,
        str(base.dtype),
        base.sha256,
        bool(base.recomputed_layers),
        compiled,
        names,
        shares,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def machine_name(device: torch.device) -> str:
    """What computes: a cache folder may serve several machines, as a home on a network does.

    Args:
        device: the accelerator, or the processor.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{device.type} {_processor(Path('/proc/cpuinfo'))} {os.cpu_count()}"
        if device.type == "cpu"
        else device.type
    )


def _processor(path: Path) -> str:
    """The name of the processor as Linux gives it in this file, or what the platform says."""
    lines = (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    )
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
