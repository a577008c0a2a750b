"""All that is to be known of a GPU, in one command of at most ten minutes: correctness, then times.

    python benchmarks/gpu_check.py --output FOLDER     on a machine with a CUDA device
    python benchmarks/gpu_check.py --output FOLDER --dry     tiny shapes on a CPU, in continuous
                                                             integration

Every figure stands in FOLDER/result.json as soon as it is known, so a lease that ends early leaves
what was found. A section has a limit of its own and runs what it can; what fails is noted with its
reason, and the next one begins. The exit status is 1 where something differs or failed. A dry run
walks through every section; its times say nothing of any device.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fedmira.config import EngineSettings
from fedmira.model import (
    BaseModel,
    LoraBranch,
    StackedAdapters,
    find_targets,
    start_adapter,
    with_engine_options,
)
from fedmira.model.generation.generate import choose_decoding, generate_tokens
from fedmira.model.lora.grouped import products_grouped
from fedmira.model.packed import probe
from fedmira.model.packed.attention import Layout, attention_ways, packed_attention, packed_layout
from fedmira.model.packed.packing import PackedBatch, pack, segment_rows
from fedmira.model.packed.varlen import why_not
from gpu_work import WORK, Place, peft_round
from launches import ShapeRow, cohort_on, count_step, llama, shared_rows
from machine import provenance

HERE = Path(__file__).resolve().parent
MOST_SECONDS = 570
SLACK_OF_A_DRY_RUN = 4
"""Times more than its limit that a section may take where its times say nothing."""
RESERVE = 5
"""Seconds that a section needs to be worth a beginning."""


class Notes:
    """Figures by name, in a file that holds all that is known so far."""

    def __init__(self, folder: Path, place: Place, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.place = folder, place
        self.wrong: list[str] = []
        self._found: dict[str, Any] = {"dry": place.dry, "provenance": provenance()}
        self._begun, self._seconds = time.monotonic(), seconds

    @property
    def spent(self) -> float:
        return time.monotonic() - self._begun

    def add(self, name: str, value: Any) -> None:
        """Write a figure down."""
        self._found[name] = value
        self._found["seconds"] = round(self.spent, 1)
        self._found["wrong"] = self.wrong
        text = json.dumps(self._found, indent=1)
        unfinished = self.folder / "result.json.new"
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(self.folder / "result.json")
        print(f"[{self.spent:6.1f}] {name}: {json.dumps(value)[:600]}", flush=True)

    def check(self, name: str, found: float, most: float) -> None:
        """Write down a difference that must not be above `most`."""
        fine = found <= most  # False of NaN
        if not fine:
            self.wrong.append(name)
        self.add(name, {"difference": found, "most": most, "fine": fine})

    @contextmanager
    def section(self, name: str, seconds: float) -> Iterator[bool]:
        """Within the block a part of the plan runs; whether there is time for it.

        Where it fails or takes longer than `seconds`, that is noted and nothing is raised.
        """
        left = self._seconds - self.spent
        if left < RESERVE:
            self.wrong.append(name)
            self.add(f"{name}/left out", f"{left:.0f} s were left")
            yield False
            return

        def stop(*_: object) -> None:
            raise TimeoutError(f"took longer than {min(seconds, left):.0f} s")

        before = signal.signal(signal.SIGALRM, stop)
        signal.alarm(max(1, int(min(seconds, left))))
        begun = self.spent
        try:
            yield True
        except Exception as error:  # noqa: BLE001 - whatever fails is a finding, and others follow
            self.wrong.append(name)
            self.add(f"{name}/error", traceback.format_exception(error)[-4:])
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
            if not self.place.dry:
                torch.cuda.empty_cache()
        self.add(f"{name}/seconds", round(self.spent - begun, 1))


def machine(notes: Notes) -> None:
    """What runs here, and which fast paths it offers."""
    place = notes.place
    found: dict[str, Any] = {
        "attention": attention_ways(place.device, place.dtype),
        "no variable-length attention, as": why_not(place.device, place.dtype),
        "grouped products": products_grouped(place.device, place.dtype),
        "cuda": torch.version.cuda,
    }
    if not place.dry:
        free, total = torch.cuda.mem_get_info()
        found |= {
            "device": torch.cuda.get_device_name(),
            "capability": torch.cuda.get_device_capability(),
            "free_gb": round(free / 1e9, 1),
            "total_gb": round(total / 1e9, 1),
        }
    notes.add("machine", found)


def attention_agrees(notes: Notes) -> None:
    """Each way of attention against a call for each row in float32: results and gradients."""
    place = notes.place
    base = place.base("grouped")
    for kind, rows in (
        ("shared", place.rows("shared", 3, 4)),
        ("ragged", place.rows("ragged", 2, 3)),
    ):
        segments = [part for k, own in enumerate(rows) for part in segment_rows(k, own, 10**6)]
        batch = pack(segments).to(place.device)
        draw = torch.Generator(place.device).manual_seed(0)
        shapes = [(1, heads, len(batch.ids), 64) for heads in (8, 2, 2)]
        inputs = [torch.randn(shape, generator=draw, device=place.device) for shape in shapes]
        wanted = _attended(base, batch, inputs, torch.float32, "rows")
        for way in attention_ways(place.device, place.dtype):
            found = _attended(base, batch, inputs, place.dtype, way)
            for what, one, other in zip(("result", "q", "k", "v"), found, wanted, strict=True):
                notes.check(
                    f"attention/{kind}/{way}/{what}",
                    float((one - other).norm() / other.norm()),
                    1e-4 if place.dry else 0.02,
                )


def _attended(
    base: BaseModel, batch: PackedBatch, inputs: list[Tensor], dtype: torch.dtype, way: str
) -> list[Tensor]:
    """What attention gives, and the gradients of its inputs, in float32."""
    own = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    layer: Any = SimpleNamespace(layer_idx=0)
    with packed_layout(base.model, Layout(batch, attention=way)):
        result, _ = packed_attention(layer, own[0], own[1], own[2], None)
    weight = torch.linspace(-1, 1, result.numel(), device=result.device).view(result.shape)
    gradients = torch.autograd.grad((result.float() * weight).sum(), own)
    return [result.detach().float(), *(tensor.float() for tensor in gradients)]


def products_agree(notes: Notes) -> None:
    """Adapters after steps with one product for all clients, against a loop over them."""
    place = notes.place
    base = place.base("llama")
    rows = place.rows("shared", 3, 4)
    moved = {}
    for grouped in (False, True):
        moving = cohort_on(base, rows, 10**5, ranks=(4, 16, 9), grouped=grouped)
        with moving.branch:
            assert moving.step()
        moved[grouped] = moving.stacked.gradients.clone()
    if not place.dry and not products_grouped(place.device, place.dtype):
        notes.wrong.append("grouped products are not used")
    notes.check(
        "grouped products/gradient",
        float((moved[True] - moved[False]).norm() / moved[False].norm()),
        1e-4 if place.dry else 0.02,
    )


def packed_agrees(notes: Notes) -> None:
    """Packed steps by each way of attention against padded ones: losses and gradients."""
    place = notes.place
    for kind in ("llama", "grouped", "gpt2"):
        base = place.base(kind)
        targets = probe._any_target(base)
        losses, stacked = probe._trial(replace(base, packed=False), targets)
        for way in attention_ways(place.device, place.dtype):
            own, other = probe._trial(replace(base, attention=way), targets)
            gradient = (other.gradients - stacked.gradients).norm() / stacked.gradients.norm()
            notes.check(
                f"packed/{kind}/{way}/loss",
                float((own - losses).norm() / losses.norm()),
                probe._OF_LOSSES[place.dtype],
            )
            notes.check(
                f"packed/{kind}/{way}/gradient", float(gradient), probe._OF_GRADIENT[place.dtype]
            )


def nothing_waits(notes: Notes) -> None:
    """A local step that would wait for the device raises."""
    place = notes.place
    moving = cohort_on(place.base("llama"), place.rows("shared"), 16384)
    with moving.branch:
        assert moving.step()  # allocates, and loads kernels
        if not place.dry:
            torch.cuda.set_sync_debug_mode("error")
        try:
            assert moving.step()
        finally:
            if not place.dry:
                torch.cuda.set_sync_debug_mode("default")
    notes.add("a step waits for nothing", True)


def repository_tests(notes: Notes) -> None:
    """The tests that need CUDA; a dry run only looks whether they are there."""
    names = ("attention", "base_model", "device_steps", "grouped_products", "memory")
    files = [f"tests/model/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    command += ["-k", "cuda or quantised", *files]
    command += ["--collect-only"] if notes.place.dry else []
    source = str(HERE.parent / "src")
    done = subprocess.run(
        command,
        cwd=HERE.parent,
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )
    notes.add("tests", {"status": done.returncode, "output": done.stdout[-2000:].splitlines()})
    if done.returncode:
        notes.wrong.append("tests")


def launches(notes: Notes) -> None:
    """Kernels of a step as they are predicted, for 8 and 32 clients."""
    config = notes.place.llama
    for clients in (8, 32):
        rows = shared_rows(clients, batch=2 if notes.place.dry else 8)
        counted = count_step(llama(config), rows, 2**17)
        notes.add(f"launches/{clients} clients, counted on meta", counted.total)


def rates(notes: Notes) -> None:
    """What the device gives at best: products, copies, launches."""
    place = notes.place
    size = 256 if place.dry else 8192
    left, right = (
        torch.randn(size, size, device=place.device, dtype=place.dtype) for _ in range(2)
    )
    spent, _ = place.timed(lambda: left @ right)
    notes.add("rates/product TFLOP/s", 2 * size**3 / spent / 1e9)
    narrow = right[:, : size // 4].contiguous()
    spent, _ = place.timed(lambda: left @ narrow, times=9)
    notes.add("rates/product of a base's shape TFLOP/s", 2 * size**2 * (size // 4) / spent / 1e9)
    one = torch.empty(2**20 if place.dry else 2**31, device=place.device, dtype=torch.uint8)
    other = torch.empty_like(one)
    spent, _ = place.timed(lambda: other.copy_(one))
    notes.add("rates/copy TB/s", 2 * one.numel() / spent / 1e9)
    small = torch.zeros(8, device=place.device)
    spent, handed = place.timed(lambda: [small.add_(1) for _ in range(1000)])
    notes.add("rates/launch in microseconds", {"device": spent, "program": handed})


def measured(
    notes: Notes,
    name: str,
    base: BaseModel,
    rows: list[list[ShapeRow]],
    budget: int,
    grouped: bool | None = None,
) -> float:
    """Milliseconds of one step of all clients."""
    place = notes.place
    moving = cohort_on(base, rows, budget, grouped=grouped)
    place.forget_peak()
    with moving.branch:
        spent, handed = place.timed(moving.step)
    given = sum(len(row.prompt) + len(row.response) for own in rows for row in own)
    computed = sum(moving.tokens) / len(moving.sums)
    notes.add(
        name,
        {
            "ms": round(spent, 1),
            "ms of the program": round(handed, 1),
            "tokens given": given,
            "tokens computed": round(computed),
            "given tokens/s": round(given / spent * 1e3),
            # Forward and backward through frozen weights: two products each.
            "TFLOP/s of the base": round(4 * base.num_parameters * computed / spent / 1e9, 1),
            "peak GB": place.peak_gb(),
            "budget": min(budget, moving.limit.tokens),
        },
    )
    return spent


def training(notes: Notes) -> None:
    """A step of 8 clients with 8 rows each beside a padded PEFT loop, by work and token budget."""
    place = notes.place
    budgets = (512,) if place.dry else (8192, 16384, 32768)
    for kind, works in (("llama", tuple(WORK)), ("gpt2", ("shared",))):
        base = place.base(kind)
        for work in works:
            rows = place.rows(work)
            fastest = min(
                measured(notes, f"training/{kind}/{work}/{budget}", base, rows, budget)
                for budget in budgets
            )
            step, restore = peft_round(base, rows, place.device)
            place.forget_peak()
            spent, handed = place.timed(step)
            restore()
            notes.add(
                f"training/{kind}/{work}/PEFT loop",
                {"ms": spent, "ms of the program": handed, "peak GB": place.peak_gb()},
            )
            notes.add(f"training/{kind}/{work}/times as fast", spent / fastest)


def ways(notes: Notes) -> None:
    """What each part of it gives: ways of attention, grouped products, compiled parts."""
    place = notes.place
    base = place.base("llama")
    budget = 512 if place.dry else 16384
    for work in ("shared", "full"):
        rows = place.rows(work)
        for way in attention_ways(place.device, place.dtype):
            measured(notes, f"ways/{work}/{way}", replace(base, attention=way), rows, budget)
        for grouped in (False, True):
            name = f"ways/{work}/{'grouped' if grouped else 'looped'}"
            measured(notes, name, base, rows, budget, grouped)
    if place.dry:
        notes.add("ways/compiled", "left out of a dry run: compiling takes minutes of a processor")
        return
    compiled = with_engine_options(base, EngineSettings(compile=True), find_targets(base.model, ()))
    for work in ("shared", "full"):
        measured(notes, f"ways/{work}/compiled", compiled, place.rows(work), budget)


def profile(notes: Notes) -> None:
    """Where a step's time goes, and how many kernels it started beside how many were predicted."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    place = notes.place
    rows, budget = place.rows("shared"), 16384
    moving = cohort_on(place.base("llama"), rows, budget)
    kinds = [ProfilerActivity.CPU, *([] if place.dry else [ProfilerActivity.CUDA])]
    with moving.branch:
        assert moving.step()
        place.wait()
        with profiled(activities=kinds) as found:
            assert moving.step()
            place.wait()
    key = "self_cpu_time_total" if place.dry else "self_cuda_time_total"
    table = found.key_averages().table(sort_by=key, row_limit=45, max_name_column_width=70)
    (notes.folder / "profile.txt").write_text(table, encoding="utf-8")
    kernels = [event for event in found.events() if "CUDA" in str(event.device_type)]
    notes.add(
        "profile",
        {
            "kernels": len(kernels),
            "predicted": count_step(llama(place.llama), rows, budget).total,
            "busy ms": sum(event.time_range.elapsed_us() for event in kernels) / 1e3,
        },
    )


def generation(notes: Notes) -> None:
    """8 clients with 16 prompts each, 32 tokens, beside a batch of 16 for each client."""
    place = notes.place
    base = place.base("llama")
    targets, limit = find_targets(base.model, ()), 32
    rows = place.rows("shared", 8, 16)
    clients = len(rows)
    adapters = [start_adapter(targets, 16, k) for k in range(clients)]
    for k, adapter in enumerate(adapters):
        for name, tensor in adapter.items():
            draw = torch.Generator().manual_seed(k)
            adapter[name] = tensor + 0.02 * torch.randn(tensor.shape, generator=draw)
    stacked = StackedAdapters(targets, adapters, [1.0] * clients, place.device, trainable=False)
    prompts = [(k, row.prompt) for k, own in enumerate(rows) for row in own]
    answers: list[list[int]] = []
    with LoraBranch(base.model, stacked) as branch:
        notes.add("generation/in waves", choose_decoding(base, branch))

        def own() -> None:
            answers[:] = generate_tokens(base, branch, prompts, limit)

        spent, handed = place.timed(own, warm=1)
        tokens = sum(map(len, answers))
        notes.add(
            "generation/fedmira",
            {"ms": spent, "ms of the program": handed, "tokens/s": tokens / spent * 1e3},
        )
        others: list[list[int]] = []

        def batched() -> None:
            others.clear()
            for k, part in enumerate(rows):
                with branch.tokens([(k, slice(None))]):
                    others.extend(_by_transformers(base, [row.prompt for row in part], limit))

        other, _ = place.timed(batched, warm=1)
    equal = sum(one == two for one, two in zip(answers, others, strict=True)) / len(prompts)
    notes.add("generation/a batch for each client", {"ms": other, "times as fast": other / spent})
    notes.add("generation/equal answers", equal)
    if place.dry and equal < 1:  # in bfloat16 near ties of random weights are decided by rounding
        notes.wrong.append("generation")


def _by_transformers(
    base: BaseModel, prompts: list[tuple[int, ...]], limit: int
) -> list[list[int]]:
    """New tokens up to the end of sequence, from one batch that is padded on the left."""
    size = max(map(len, prompts))
    ids = torch.tensor([[0] * (size - len(each)) + [*each] for each in prompts])
    seen = torch.tensor([[0] * (size - len(each)) + [1] * len(each) for each in prompts])
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    options |= {"max_new_tokens": limit, "attention_mask": seen.to(base.device)}
    with torch.no_grad():
        found: Tensor = base.model.generate(ids.to(base.device), **options)  # type: ignore[operator]
    new = found[:, size:].tolist()
    return [each[: each.index(2)] if 2 in each else each for each in new]


def fused(notes: Notes) -> None:
    """What liger-kernel's norms, rotary positions and SwiGLU would give, where it is installed.

    The last section, as its rotary positions stay in transformers.
    """
    if find_spec("liger_kernel") is None or notes.place.dry:
        notes.add("fused", "left out: it needs liger-kernel, which needs Triton and a GPU")
        return
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    base = notes.place.base("llama")
    targets = probe._any_target(base)
    losses, stacked = probe._trial(base, targets)
    apply_liger_kernel_to_llama(
        model=base.model,
        rope=True,
        swiglu=True,
        rms_norm=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
    )
    own, other = probe._trial(base, targets)
    gradient = (other.gradients - stacked.gradients).norm() / stacked.gradients.norm()
    dtype = notes.place.dtype
    notes.check("fused/loss", float((own - losses).norm() / losses.norm()), probe._OF_LOSSES[dtype])
    notes.check("fused/gradient", float(gradient), probe._OF_GRADIENT[dtype])
    for work in ("shared", "full"):
        measured(notes, f"fused/{work}", base, notes.place.rows(work), 16384)


@dataclass(frozen=True)
class Section:
    """A part of the plan, and how many seconds it may take."""

    name: str
    seconds: int
    run: Callable[[Notes], None]


PLAN = (
    Section("machine", 15, machine),
    Section("attention", 30, attention_agrees),
    Section("grouped products", 15, products_agree),
    Section("packed steps", 50, packed_agrees),
    Section("no waiting", 20, nothing_waits),
    Section("tests", 90, repository_tests),
    Section("launches", 30, launches),
    Section("rates", 15, rates),
    Section("training", 140, training),
    Section("ways", 75, ways),
    Section("profile", 25, profile),
    Section("generation", 45, generation),
    Section("fused", 20, fused),
)
"""What is right comes before what is fast: a lease may end at any time."""


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder for result.json")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--seconds", type=float, default=MOST_SECONDS, help="for all of it")
    arguments = parser.parse_args(given)
    if not arguments.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --dry walks through the plan on a CPU")
    notes = Notes(arguments.output, Place(arguments.dry), arguments.seconds)
    for section in PLAN:
        seconds = section.seconds * (SLACK_OF_A_DRY_RUN if arguments.dry else 1)
        with notes.section(section.name, seconds) as there_is_time:
            if there_is_time:
                section.run(notes)
    notes.add("finished", True)
    if notes.wrong:
        print(f"not as it should be: {', '.join(notes.wrong)}", file=sys.stderr)
    return 1 if notes.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
