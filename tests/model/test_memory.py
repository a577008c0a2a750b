"""What saves memory changes no result.

Blocks of logits, layers computed again, smaller passes after memory ran out.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional

from fedmira.config import AdapterSettings, EngineSettings, LocalSettings
from fedmira.errors import ModelError, RunError
from fedmira.model import (
    BaseModel,
    LocalOutcome,
    LocalTask,
    LoraBranch,
    LoraKind,
    PromptKind,
    StackedAdapters,
    TargetModule,
    adapter_kind,
    find_targets,
    most_side_by_side,
    start_adapter,
    train_cohort,
    with_engine_options,
    within_memory,
)
from fedmira.model.base import memory
from fedmira.model.base.layers import compile_free_parts, decoder_layers, uncompile
from fedmira.model.base.memory import PassLimit, free_bytes, total_bytes
from fedmira.model.generation import generate as generation
from fedmira.model.generation.generate import fit_prompts
from fedmira.model.generation.waves import plan_waves
from fedmira.model.lora.stack import adapter_names
from fedmira.model.packed import response_loss as response_loss_module
from fedmira.model.packed import token_budget
from fedmira.model.packed.response_loss import response_loss
from tiny import ARCHITECTURES, draw_rows, tiny_base


def train(
    base: BaseModel, dropout: float = 0.0, budget: int = 200, names: tuple[str, ...] = ()
) -> list[LocalOutcome]:
    targets = find_targets(base.model, names)
    tasks = [
        LocalTask(start_adapter(targets, 4, 1), 2.0, draw_rows(6, shared, shared), shared)
        for shared in (9, 0)
    ]
    return train_cohort(base, targets, tasks, LocalSettings(steps=3, batch_size=4), dropout, budget)


def assert_equal(
    left: list[LocalOutcome], right: list[LocalOutcome], tolerance: float = 0.0
) -> None:
    for one, other in zip(left, right, strict=True):
        for name, tensor in one.adapter.items():
            assert torch.allclose(tensor, other.adapter[name], rtol=0, atol=tolerance), name


@pytest.mark.parametrize("bias", [False, True])
def test_a_loss_in_blocks_has_the_values_and_gradients_of_the_whole(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=bias).requires_grad_(False)
    hidden, weight = (
        torch.randn(100, 16, generator=draw).requires_grad_(),
        torch.rand(100, generator=draw),
    )
    targets = torch.randint(0, 50, (100,), generator=draw)
    monkeypatch.setattr(
        response_loss_module, "_BLOCK_LOGITS", {"cpu": 50 * 33}
    )  # blocks of 33, 33, 33 and 1 tokens
    found, expected = (
        response_loss(head, hidden, targets),
        functional.cross_entropy(head(hidden), targets, reduction="none"),
    )
    assert torch.allclose(found, expected, atol=1e-5)
    gradients = [
        torch.autograd.grad((each * weight).sum(), hidden)[0] for each in (found, expected)
    ]
    assert torch.allclose(*gradients, atol=1e-6)


def test_a_loss_in_bfloat16_is_scaled_before_it_is_rounded() -> None:
    """1/count has no exact bfloat16.

    Rounded by itself, it would shift a client's whole gradient.
    """
    draw = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(7, 16, generator=draw).bfloat16().requires_grad_()
    targets = torch.randint(0, 50, (7,), generator=draw)
    whole, scaled = (
        torch.autograd.grad((response_loss(head, hidden, targets) * scale).sum(), hidden)[0]
        for scale in (1.0, 1 / 7)
    )
    assert torch.equal(scaled, (whole.float() * torch.tensor(1 / 7)).bfloat16())


def test_a_reduced_base_adds_up_its_factors_gradients_in_float32() -> None:
    """Both factors' gradients are those of the layer's bfloat16 values multiplied in float64.

    Sums in bfloat16 would miss them by 1/256.
    """
    draw = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40, dtype=torch.bfloat16).requires_grad_(False))
    name_a, name_b = adapter_names(target := TargetModule("0", 24, 40, False))
    adapter = {
        name_a: torch.randn(4, 24, generator=draw),
        name_b: torch.randn(40, 4, generator=draw),
    }
    stacked = StackedAdapters([target], [adapter], [0.5], torch.device("cpu"))
    inputs, weight = (torch.randn(1, 30, width, generator=draw).bfloat16() for width in (24, 40))
    with (
        LoraBranch(model, stacked) as branch,
        branch.tokens([(0, slice(0, 13)), (0, slice(13, 30))]),
    ):
        (model(inputs) * weight).sum().backward()
    down = (inputs[0] @ adapter[name_a].bfloat16().T).double()
    to_down = ((weight[0] @ adapter[name_b].bfloat16()) * 0.5).double()
    expected = {name_a: to_down.T @ inputs[0].double(), name_b: 0.5 * weight[0].double().T @ down}
    for name, gradient in stacked.views(stacked.gradients, 0).items():
        assert torch.allclose(gradient.double(), expected[name], rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_layers_give_the_same_bits(architecture: str, dropout: float) -> None:
    base = tiny_base(architecture)
    recomputing = with_engine_options(
        base, EngineSettings(recompute=True), find_targets(base.model, ())
    )
    assert len(recomputing.recomputed_layers) == 2
    assert_equal(train(base, dropout), train(recomputing, dropout))
    assert_equal(
        train(replace(base, packed=False), dropout),
        train(replace(recomputing, packed=False), dropout),
    )


def test_recomputed_layers_are_remembered_by_their_input_only() -> None:
    """Bytes that autograd keeps between forward and backward, counted once for each storage."""
    base = tiny_base()
    kept = []
    for each in (
        base,
        with_engine_options(base, EngineSettings(recompute=True), find_targets(base.model, ())),
    ):
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            train(each)
        kept.append(sum(sizes.values()))
    assert kept[1] < kept[0] / 2


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None,
    reason="torch.compile needs a C++ compiler on a CPU; there is no g++",
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_parts_give_the_same_adapters_to_rounding() -> None:
    plain = train(tiny_base())
    base = tiny_base()
    compiled = with_engine_options(base, EngineSettings(compile=True), find_targets(base.model, ()))
    assert_equal(plain, train(compiled), 5e-5)


def patched(base: BaseModel) -> list[str]:
    """Modules whose own `forward` has been replaced."""
    return [name for name, module in base.model.named_modules() if "forward" in vars(module)]


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # of torch's own, where torch.compile is imported
@pytest.mark.parametrize("adapter", [{}, {"kind": "prompt"}], ids=["lora", "prompt"])
def test_options_of_one_run_do_not_stay_on_a_base_that_serves_the_next(
    adapter: dict[str, Any],
) -> None:
    base = tiny_base()
    untouched = patched(base)
    first = adapter_kind(AdapterSettings(), base, EngineSettings(compile=True, recompute=True))
    assert patched(base) != untouched and len(first.base.recomputed_layers) == 2
    for shared in (base, first.base):
        after = adapter_kind(AdapterSettings(**adapter), shared, EngineSettings())
        assert patched(after.base) == untouched and not after.base.recomputed_layers


def test_compile_says_when_nothing_is_left_to_compile() -> None:
    base = tiny_base()
    everywhere = find_targets(base.model, ())
    for layer in base.model.model.layers:  # type: ignore[union-attr]
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            name = next(name for name, module in base.model.named_modules() if module is part)
            everywhere = [*everywhere, replace(everywhere[0], name=name)]
    with pytest.raises(
        ModelError, match=r"engine\.compile: every part of every layer carries an adapter"
    ):
        with_engine_options(base, EngineSettings(compile=True), everywhere)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_goes_on_with_smaller_passes_when_memory_runs_out(
    dropout: float, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that has memory for 70 tokens only: 400, 200 and 100 are too many."""
    expected = train(tiny_base(), dropout, budget=64)
    base = tiny_base()

    def limited(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        if options["input_ids"].shape[1] > 70:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = base.model.base_model.register_forward_pre_hook(limited, with_kwargs=True)
    assert_equal(train(base, dropout, budget=400), expected)
    handle.remove()
    assert "going on with at most 64 tokens" in caplog.text


@contextmanager
def memory_for(base: BaseModel, tokens: int) -> Iterator[list[int]]:
    """The base has memory for so many tokens in a pass; the sizes of passes that were too large."""
    refused: list[int] = []

    def limited(module: Any, arguments: Any, options: Mapping[str, Any]) -> None:
        read = options.get("input_ids")
        size = (options["inputs_embeds"][..., 0] if read is None else read).numel()
        if size > tokens:
            refused.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = base.model.base_model.register_forward_pre_hook(limited, with_kwargs=True)
    try:
        yield refused
    finally:
        handle.remove()


@pytest.mark.parametrize("adapter", [{}, {"kind": "prompt"}], ids=["lora", "prompt"])
def test_a_budget_that_was_too_large_once_is_not_tried_again(adapter: dict[str, Any]) -> None:
    """In any later round of training, and when adapters are measured for a second time."""
    base = tiny_base()
    kind = adapter_kind(AdapterSettings(**adapter), base, EngineSettings())
    assert isinstance(kind, LoraKind | PromptKind)
    start = kind.starts({"a": 4}, 1)["a"]
    rows = draw_rows(12, 0, 1)
    task = LocalTask(start, 1.0, rows, 1)
    with memory_for(base, 70) as refused:
        kind.train([task], LocalSettings(steps=1, batch_size=12), 400)
        assert refused and kind.limits.train.tokens == 64
        refused.clear()
        kind.train([task], LocalSettings(steps=2, batch_size=12), 400)
        assert not refused
        first = kind.losses([start], [1.0], [rows], 400)
        assert refused  # measuring takes another amount of memory, and finds out by itself
        refused.clear()
        assert kind.losses([start], [1.0], [rows], 400) == first and not refused


def test_a_limit_never_raises_a_budget() -> None:
    limit = PassLimit(128)
    assert within_memory(lambda budget: budget, 100, limit) == (100, 100)
    assert within_memory(lambda budget: budget, 1000, limit) == (128, 128)


def test_answers_that_run_out_of_memory_have_a_smaller_cache_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """16 prompts of one token, so every pass is a step.

    The whole cache holds 16 rows, half of it 8. There is memory for 9.
    """
    base = tiny_base()
    kind = LoraKind(base, find_targets(base.model, ()), 8.0)
    start = kind.starts({"a": 4}, 1)["a"]
    prompts = [(0, [3 + i]) for i in range(16)]
    expected = kind.generate(
        [start], [1.0], prompts, 6, 256
    )  # with enough memory; decoding has been tried out here
    shape = generation._cache_shape(base)
    (wave,) = plan_waves(fit_prompts(base, prompts, 6), shape, 2**28)
    monkeypatch.setattr(generation, "_CPU_CACHE", shape.of(wave.size))
    with memory_for(base, 9) as refused:
        assert kind.generate([start], [1.0], prompts, 6, 256) == expected
        assert refused == [16]
        assert kind.generate([start], [1.0], prompts, 6, 256) == expected
        assert refused == [16]


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"
)
def test_memory_that_pytorch_holds_for_later_is_free() -> None:
    device = torch.device("cuda")
    torch.zeros(1, device=device)
    before = free_bytes(device)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert free_bytes(device) < before - 2**27
    del block
    assert free_bytes(device) > before - 2**27


def test_large_adapters_train_fewer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of 32 GiB holds 2^28 numbers that stand eight times."""
    monkeypatch.setattr(memory, "total_bytes", lambda device: 2.0**35)
    cpu = torch.device("cpu")
    assert most_side_by_side(2**20, cpu) == 64
    assert most_side_by_side(2**24, cpu) == 16
    assert most_side_by_side(3 * 2**24, cpu) == 5
    assert most_side_by_side(2**29, cpu) == 1  # does not fit, and is said when memory runs out
    monkeypatch.setattr(memory, "total_bytes", lambda device: math.inf)
    assert most_side_by_side(2**29, cpu) == 64


def test_all_memory_is_that_of_the_machine_or_of_the_group(tmp_path: Path) -> None:
    listed = tmp_path / "meminfo"
    listed.write_text("MemTotal:       1000 kB\nMemAvailable:    400 kB\n", encoding="ascii")
    assert memory._of_meminfo(listed, "MemTotal") == 1_024_000
    assert memory._limit_of_group(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("5000\n", encoding="ascii")
    assert memory._limit_of_group(tmp_path) == 5000
    assert free_bytes(torch.device("cpu")) <= total_bytes(torch.device("cpu"))


def test_a_budget_is_kept_for_one_processor_only(tmp_path: Path) -> None:
    listed = tmp_path / "cpuinfo"
    listed.write_text(
        "processor\t: 0\nmodel name\t: Example CPU: 3 GHz\nprocessor\t: 1\nmodel name\t: "
        "Example CPU: 3 GHz\n",
        encoding="utf-8",
    )
    assert token_budget._processor(listed) == "Example CPU: 3 GHz"
    assert token_budget._processor(tmp_path / "none") in (platform.processor(), platform.machine())
    assert (
        token_budget.machine_name(torch.device("cpu"))
        == f"cpu {token_budget._processor(Path('/proc/cpuinfo'))} {os.cpu_count()}"
    )


def test_when_nothing_is_small_enough_the_error_says_what_to_do() -> None:
    def work(budget: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RunError, match=r"out of memory with 64 tokens.*engine\.recompute"):
        within_memory(work, 1000)


@pytest.mark.parametrize(
    "message",
    [
        "MPS backend out of memory (MPS allocated: 5 GiB)",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes",
        "[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to "
        "allocate 99 bytes",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_running_out_of_memory_is_known_on_every_system(message: str) -> None:
    def work(budget: int) -> str:
        if budget > 300:
            raise RuntimeError(message)
        return "done"

    assert within_memory(work, 1000) == ("done", 250)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def work(budget: int) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        within_memory(work, 1000)


def test_the_trial_is_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMIRA_CACHE", str(tmp_path / "new"))
    base = tiny_base()
    targets = find_targets(base.model, ())
    first = token_budget.choose_token_budget(base, targets)
    assert first in token_budget._CANDIDATES["cpu"]
    kept = (tmp_path / "new" / "token_budget.json").read_bytes()
    assert token_budget.choose_token_budget(base, targets) == first
    assert (tmp_path / "new" / "token_budget.json").read_bytes() == kept


def test_a_pass_of_the_trial_has_as_many_clients_as_one_of_the_run() -> None:
    """Steps of 300 tokens: 1.7, 3.4, 6.8 and 13.7 of them fit, down to powers of two."""
    passes = [token_budget._clients_of(budget, 300, 40) for budget in (512, 1024, 2048, 4096)]
    assert passes == [1, 2, 4, 8]
    assert token_budget._clients_of(4096, 300, 5) == 4, "no more than a round has"
    assert token_budget._clients_of(4096, 0.0, 5) == 1 == token_budget._clients_of(512, 9000, 5)


def test_the_trial_runs_by_the_processors_clock_through_all_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass takes an hour by the wall, as beside many neighbours; the last are slow, too."""
    monkeypatch.setenv("FEDMIRA_CACHE", str(tmp_path))
    seen: list[tuple[int, int]] = []
    clock = {"own": 0.0, "wall": 0.0}

    def spent(base: Any, branch: Any, batches: Any, budget: int, count: bool = False) -> float:
        seen.append((budget, len(batches)))
        clock["own"] += {512: 1.0, 1024: 1.5, 2048: 2.0, 4096: 8.0}[budget]
        clock["wall"] += 3600.0
        return 100.0

    monkeypatch.setattr(token_budget, "_pass", spent)
    monkeypatch.setattr(token_budget.time, "process_time", lambda: clock["own"])
    monkeypatch.setattr(token_budget.time, "perf_counter", lambda: clock["wall"])
    base = tiny_base()
    targets = find_targets(base.model, ())
    assert token_budget.choose_token_budget(base, targets, 300, 40) == 2048
    assert [clients for _, clients in seen] == sorted(clients for _, clients in seen)
    assert dict(seen) == {512: 1, 1024: 2, 2048: 4, 4096: 8}
    tried = len(seen)
    assert token_budget.choose_token_budget(base, targets, 310, 50) == 2048
    assert len(seen) == tried, "passes with as many clients are not tried again"
    token_budget.choose_token_budget(base, targets, 3000, 40)
    assert len(seen) > tried, "passes of one client are"


@pytest.mark.parametrize("kept", [False, True])
def test_what_memory_ended_before_the_third_candidate_is_used_and_not_kept(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMIRA_CACHE", str(tmp_path))
    most = 2048 if kept else 1024

    def limited(base: Any, branch: Any, batches: Any, budget: int, count: bool = False) -> float:
        if budget > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return 100.0

    monkeypatch.setattr(token_budget, "_pass", limited)
    base = tiny_base()
    found = token_budget.choose_token_budget(base, find_targets(base.model, ()))
    assert found in (512, 1024, 2048) and found <= most
    assert (tmp_path / "token_budget.json").exists() == kept


def test_a_budget_is_halved_until_it_fits_the_memory() -> None:
    assert token_budget._bounded(4096, 1e6, 4096e6) == 1024  # 40 % of 4,096 MB hold 1,638 tokens
    assert token_budget._bounded(4096, 1e6, 1e12) == 4096
    assert token_budget._bounded(4096, 1e9, 1e6) == 64


def test_a_damaged_file_of_budgets_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMIRA_CACHE", str(tmp_path))
    (tmp_path / "token_budget.json").write_text('{"a": 3}', encoding="utf-8")
    base = tiny_base()
    assert (
        token_budget.choose_token_budget(base, find_targets(base.model, ()))
        in token_budget._CANDIDATES["cpu"]
    )


def test_a_layer_whose_output_is_a_view_of_its_own_function_gets_its_branch() -> None:
    """As quantised layers give it: changing such a view in place is an error."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(weight)
            return (inputs.flatten(0, -2) @ weight.T).view(*inputs.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            return grad @ ctx.saved_tensors[0], None

    class OwnLinear(torch.nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return Own.apply(inputs, self.weight)  # type: ignore[no-any-return]

    expected, base = train(tiny_base()), tiny_base()
    for layer in base.model.model.layers:  # type: ignore[union-attr]
        for name in ("q_proj", "v_proj"):
            getattr(layer.self_attn, name).__class__ = OwnLinear
    assert_equal(expected, train(base), 5e-5)


def test_attention_is_never_compiled_as_each_pass_brings_another_one() -> None:
    base = tiny_base()
    layers = decoder_layers(base.model)
    try:
        assert compile_free_parts(layers, [layer.mlp for layer in layers]) == 2 * len(
            layers
        )  # the two norms of each
        assert not any("forward" in vars(layer.self_attn) for layer in layers)
    finally:
        uncompile(layers)
