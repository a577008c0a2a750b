"""What saves memory changes no result: blocks of logits, layers computed again, smaller passes after memory ran out."""

from __future__ import annotations

import shutil
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
    LocalTask,
    adapter_kind,
    find_targets,
    start_adapter,
    token_budget,
    train_cohort,
    with_engine_options,
    within_memory,
)
from fedmira.model import response_loss as response_loss_module
from fedmira.model.local_training import LocalOutcome
from fedmira.model.response_loss import response_loss
from tiny import ARCHITECTURES, draw_rows, tiny_base


def train(base: BaseModel, dropout: float = 0.0, budget: int = 200, names: tuple[str, ...] = ()) -> list[LocalOutcome]:
    targets = find_targets(base.model, names)
    tasks = [LocalTask(start_adapter(targets, 4, 1), 2.0, draw_rows(6, shared, shared), shared) for shared in (9, 0)]
    return train_cohort(base, targets, tasks, LocalSettings(steps=3, batch_size=4), dropout, budget)


def assert_equal(left: list[LocalOutcome], right: list[LocalOutcome], tolerance: float = 0.0) -> None:
    for one, other in zip(left, right, strict=True):
        for name, tensor in one.adapter.items():
            assert torch.allclose(tensor, other.adapter[name], rtol=0, atol=tolerance), name


@pytest.mark.parametrize("bias", [False, True])
def test_a_loss_in_blocks_has_the_values_and_gradients_of_the_whole(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=bias).requires_grad_(False)
    hidden, weight = torch.randn(100, 16, generator=draw).requires_grad_(), torch.rand(100, generator=draw)
    targets = torch.randint(0, 50, (100,), generator=draw)
    monkeypatch.setattr(response_loss_module, "_BLOCK_LOGITS", 50 * 33)  # blocks of 33, 33, 33 and 1 tokens
    found, expected = response_loss(head, hidden, targets), functional.cross_entropy(head(hidden), targets, reduction="none")
    assert torch.allclose(found, expected, atol=1e-5)
    gradients = [torch.autograd.grad((each * weight).sum(), hidden)[0] for each in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_layers_give_the_same_bits(architecture: str, dropout: float) -> None:
    base = tiny_base(architecture)
    recomputing = with_engine_options(base, EngineSettings(recompute=True), find_targets(base.model, ()))
    assert len(recomputing.recomputed_layers) == 2
    assert_equal(train(base, dropout), train(recomputing, dropout))
    assert_equal(train(replace(base, packed=False), dropout), train(replace(recomputing, packed=False), dropout))


def test_recomputed_layers_are_remembered_by_their_input_only() -> None:
    """Bytes that autograd keeps between forward and backward, counted once for each storage."""
    base = tiny_base()
    kept = []
    for each in (base, with_engine_options(base, EngineSettings(recompute=True), find_targets(base.model, ()))):
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            train(each)
        kept.append(sum(sizes.values()))
    assert kept[1] < kept[0] / 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU; there is no g++")
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, where torch.compile is imported
@pytest.mark.parametrize("adapter", [{}, {"kind": "prompt"}], ids=["lora", "prompt"])
def test_options_of_one_run_do_not_stay_on_a_base_that_serves_the_next(adapter: dict[str, Any]) -> None:
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
    with pytest.raises(ModelError, match=r"engine\.compile: every part of every layer carries an adapter"):
        with_engine_options(base, EngineSettings(compile=True), everywhere)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_goes_on_with_smaller_passes_when_memory_runs_out(dropout: float, caplog: pytest.LogCaptureFixture) -> None:
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
        "[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes",
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


def test_a_budget_is_halved_until_it_fits_the_memory() -> None:
    assert token_budget._bounded(4096, 1e6, 4096e6) == 1024  # 40 % of 4,096 MB hold 1,638 tokens
    assert token_budget._bounded(4096, 1e6, 1e12) == 4096
    assert token_budget._bounded(4096, 1e9, 1e6) == 64


def test_a_damaged_file_of_budgets_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMIRA_CACHE", str(tmp_path))
    (tmp_path / "token_budget.json").write_text('{"a": 3}', encoding="utf-8")
    base = tiny_base()
    assert token_budget.choose_token_budget(base, find_targets(base.model, ())) in token_budget._CANDIDATES["cpu"]


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
