"""Packed attention: every kernel gives what full attention over each row by itself gives.

Values and gradients.
"""

from __future__ import annotations

import inspect
import math
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmira.config import EngineSettings
from fedmira.model import (
    BaseModel,
    LoraBranch,
    StackedAdapters,
    find_targets,
    response_losses,
    start_adapter,
    with_engine_options,
)
from fedmira.model.packed import attention, joined, varlen
from fedmira.model.packed.attention import (
    ATTENTION,
    Layout,
    _attend_by_row,
    _layout,
    attention_ways,
    layers_seen,
    packed_attention,
    packed_layout,
)
from fedmira.model.packed.cpu import attend_on_cpu, plan_for_cpu
from fedmira.model.packed.joined import attend_joined, joined_plan
from fedmira.model.packed.packing import PackedBatch, pack, segment_rows
from fedmira.model.packed.varlen import attend_copied, sequences_of, varlen_available, why_not
from tiny import draw_rows, tiny_base
from varlen_stand_in import flash_backward, varlen_2_11, varlen_2_12

SIZE = 8


def batch_of(shared: tuple[int, ...], seed: int, longest: int = 9) -> PackedBatch:
    """One segment for each entry: that many shared tokens, and a few rows."""
    parts = [
        segment_rows(k, draw_rows(1 + (seed + k) % 4, count, seed + k, longest=longest), 10_000)
        for k, count in enumerate(shared)
    ]
    return pack([segment for part in parts for segment in part])


def heads(count: int, tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, tokens, SIZE, generator=draw, dtype=dtype).requires_grad_()


def row_by_row(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch) -> Tensor:
    """Softmax attention written out in float64 with a mask over the whole flat row.

    Who is before me in my own row or in its prefix.
    """
    tokens = query.shape[2]
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for segment, start in zip(batch.segments, batch.starts, strict=True):
        prefix = slice(start, start + segment.prefix)
        seen[prefix, prefix] = torch.ones(segment.prefix, segment.prefix).tril().bool()
        place = prefix.stop
        for length in segment.lengths:
            own = slice(place, place + length)
            seen[own, prefix], seen[own, own] = True, torch.ones(length, length).tril().bool()
            place += length
    share = query.shape[1] // key.shape[1]
    keys, values = (tensor.double().repeat_interleave(share, dim=1) for tensor in (key, value))
    scores = (query.double() @ keys.transpose(-1, -2)) / math.sqrt(SIZE)
    return (scores.masked_fill(~seen, -math.inf).softmax(dim=-1) @ values).transpose(1, 2)


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=3),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.integers(0, 99),
)
def test_kernels_equal_attention_of_each_row_by_itself(
    shared: list[int], shape: tuple[int, int], seed: int
) -> None:
    batch = batch_of(tuple(shared), seed)
    inputs = [
        heads(count, len(batch.ids), seed + i)
        for i, count in enumerate((shape[0], shape[1], shape[1]))
    ]
    expected = row_by_row(*inputs, batch)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed))
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    scale = SIZE**-0.5
    for result in (
        attend_on_cpu(*inputs, plan_for_cpu(batch), scale),
        _attend_by_row(*inputs, batch, scale, None, {}),
    ):
        assert torch.allclose(result.double(), expected, atol=1e-5)
        for found, want in zip(
            torch.autograd.grad((result * weight).sum(), inputs), wanted, strict=True
        ):
            assert torch.allclose(found, want, atol=3e-5)


def test_long_rows_are_cut_into_blocks_without_a_difference() -> None:
    batch = batch_of((300,), 3, longest=150)
    inputs = [heads(count, len(batch.ids), count) for count in (4, 2, 2)]
    result, expected = (
        attend_on_cpu(*inputs, plan_for_cpu(batch), SIZE**-0.5),
        row_by_row(*inputs, batch),
    )
    assert torch.allclose(result.double(), expected, atol=1e-5)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    pairs = zip(
        *(torch.autograd.grad((each * weight).sum(), inputs) for each in (result, expected)),
        strict=True,
    )
    assert all(torch.allclose(found, want, atol=1e-4) for found, want in pairs)


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=3),
    st.sampled_from([9, 150]),
    st.integers(0, 99),
)
def test_queries_that_predict_alone_get_what_they_get_among_all(
    shared: list[int], longest: int, seed: int
) -> None:
    batch = batch_of(tuple(shared), seed, longest=longest)
    inputs = [heads(count, len(batch.ids), seed + count) for count in (4, 2, 2)]
    plans = [plan_for_cpu(batch, predicting) for predicting in (False, True)]
    query, key, value = inputs
    whole = attend_on_cpu(query, key, value, plans[0], 0.3)[:, batch.predict_at]
    alone = attend_on_cpu(query[:, :, batch.predict_at], key, value, plans[1], 0.3)
    assert torch.allclose(alone, whole, atol=1e-5)
    weight = torch.randn(whole.shape, generator=torch.Generator().manual_seed(seed))
    pairs = zip(
        *(torch.autograd.grad((each * weight).sum(), inputs) for each in (alone, whole)),
        strict=True,
    )
    assert all(torch.allclose(found, want, atol=3e-5) for found, want in pairs)


def test_sequences_for_variable_length_kernels_list_every_key_a_row_sees() -> None:
    batch = batch_of((5, 0), 2)
    sequences = sequences_of(batch)
    number = 0
    for segment, start in zip(batch.segments, batch.starts, strict=True):
        prefix = list(range(start, start + segment.prefix))
        place, parts = start + segment.prefix, [(prefix, prefix)] if prefix else []
        for length in segment.lengths:
            own = list(range(place, place + length))
            parts.append((own, [*prefix, *own]))
            place += length
        for own, seen in parts:
            ends = sequences.stretches
            keys = sequences.keys[ends.key_ends[number] : ends.key_ends[number + 1]]
            assert keys.tolist() == seen
            asking = range(int(ends.query_ends[number]), int(ends.query_ends[number + 1]))
            assert list(asking) == own
            number += 1
    assert number == len(sequences.stretches.query_ends) - 1


@pytest.fixture(params=[varlen_2_11, varlen_2_12], ids=["torch 2.11", "torch 2.12"])
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's contract on this processor, by the signatures that it has had."""
    monkeypatch.setattr(varlen, "varlen_attn", request.param)
    monkeypatch.setattr(joined, "_flash_backward", flash_backward)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("shape", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("shared", [(12, 0, 7), (0, 0), (9,), (1, 20, 3)])
def test_calls_of_unlike_lengths_equal_attention_of_each_row_by_itself(
    shared: tuple[int, ...], shape: tuple[int, int]
) -> None:
    """In float64, so that a joined backward that is not exact would show."""
    batch = batch_of(shared, 4, longest=20)
    counts = (shape[0], shape[1], shape[1])
    inputs = [heads(count, len(batch.ids), 7 + i, torch.float64) for i, count in enumerate(counts)]
    expected = row_by_row(*inputs, batch)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    scale = SIZE**-0.5
    for result in (
        attend_joined(*inputs, joined_plan(batch), scale),
        attend_copied(*inputs, sequences_of(batch), scale, None),
    ):
        assert torch.allclose(result, expected, atol=1e-12)
        found = torch.autograd.grad((result * weight).sum(), inputs)
        assert all(
            torch.allclose(one, other, atol=1e-12) for one, other in zip(found, wanted, strict=True)
        )


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("window", [1, 4, 15])
def test_a_window_counts_the_query_itself_in_either_way(window: int) -> None:
    batch = batch_of((9, 0), 4)
    inputs = [heads(count, len(batch.ids), count) for count in (4, 2, 2)]
    copied = attend_copied(*inputs, sequences_of(batch), 0.4, window)
    assert torch.allclose(copied, _attend_by_row(*inputs, batch, 0.4, window, {}), atol=1e-6)


def test_a_torch_with_sums_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm gives them sequence by sequence; the trial at load time then takes copied keys."""

    def other(*tensors: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        out, sums = varlen_2_12(*tensors, **options)  # type: ignore[arg-type]
        return out, sums[None]

    other.__signature__ = inspect.signature(varlen_2_12)  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", other)
    batch = batch_of((9, 0), 4)
    inputs = [heads(4, len(batch.ids), seed) for seed in range(3)]
    with pytest.raises(NotImplementedError, match="log-sum-exps of shape"):
        attend_joined(*inputs, joined_plan(batch), 0.4)


def gradient_of_a_step(base: BaseModel) -> Tensor:
    """Of two clients' adapters, by packed passes of the base."""
    targets = find_targets(base.model, ())
    starts = [
        {
            name: tensor + 0.1 * torch.randn(tensor.shape, generator=draw)
            for name, tensor in start_adapter(targets, 4, k).items()
        }
        for k in range(2)
        for draw in [torch.Generator().manual_seed(k)]
    ]
    stacked = StackedAdapters(targets, starts, [1.0, 2.0], base.device)
    batches = [(k, draw_rows(4, 9 * k, seed=k)) for k in range(2)]
    with LoraBranch(base.model, stacked) as branch:
        for losses in response_losses(base, branch, batches, 200):
            losses.values.sum().backward()
    return stacked.gradients


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("way", ["joined", "copied"])
def test_whole_steps_by_calls_of_unlike_lengths_have_the_same_gradient(
    way: str, architecture: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3 has windows, so that its layers take copied keys where rows are longer."""
    base = tiny_base(architecture)
    wanted = gradient_of_a_step(base)
    base = with_engine_options(
        replace(base, attention=way), EngineSettings(recompute=recompute), ()
    )
    monkeypatch.setattr(attention, "attention_ways", lambda *_: ("joined", "copied", "rows"))
    with layers_seen() as seen:
        found = gradient_of_a_step(base)
    assert seen[0] == ((True, "copied") if architecture == "gemma3" else (False, way))
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


def older_varlen(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float = 1.0
) -> Tensor:
    """torch 2.10: causal by a flag, and no windows."""
    raise AssertionError("it is not called")


@pytest.mark.parametrize(
    ("kernel", "dtype", "ways", "reason"),
    [
        (varlen_2_12, torch.bfloat16, ("joined", "copied", "rows"), ""),
        (varlen_2_11, torch.float16, ("joined", "copied", "rows"), ""),
        (varlen_2_12, torch.float32, ("rows",), "model.dtype"),
        (older_varlen, torch.bfloat16, ("rows",), "torch 2.11"),
        (None, torch.bfloat16, ("rows",), "torch 2.11"),
    ],
)
def test_what_a_gpu_takes_depends_on_torch_and_the_number_type(
    kernel: object,
    dtype: torch.dtype,
    ways: tuple[str, ...],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    for name in ("cuda", "meta"):
        device = torch.device(name)
        attention_ways.cache_clear()
        assert attention_ways(device, dtype) == ways
        assert reason in why_not(device, dtype) and bool(reason) == bool(why_not(device, dtype))
    attention_ways.cache_clear()
    assert attention_ways(torch.device("cpu"), dtype) == ("blocks", "rows")
    assert set(ways) < set(ATTENTION)


def test_layers_with_a_window_say_what_they_take() -> None:
    """Also where this pass's rows are shorter than the window."""
    base, batch = tiny_base(), batch_of((5, 0), 2)
    first, second = (layer.self_attn for layer in base.model.model.layers)  # type: ignore[union-attr]
    inputs = [heads(count, len(batch.ids), count).detach() for count in (4, 2, 2)]
    with packed_layout(base.model, Layout(batch)), layers_seen() as seen:
        packed_attention(first, *inputs, None)
        packed_attention(second, *inputs, None, sliding_window=100)
    assert seen == {0: (False, "blocks"), 1: (True, "rows")}


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"
)
@pytest.mark.parametrize("way", ["joined", "copied"])
@pytest.mark.parametrize("shared", [(20, 0, 7)])
def test_the_cuda_kernel_equals_attention_of_each_row_by_itself(
    shared: tuple[int, ...], way: str
) -> None:
    batch = batch_of(shared, 4, longest=40)
    inputs = [heads(count, len(batch.ids), count).detach().bfloat16() for count in (4, 2, 2)]
    expected = row_by_row(*(tensor.float() for tensor in inputs), batch)
    on_device = [tensor.cuda().requires_grad_() for tensor in inputs]
    if not varlen_available(on_device[0].device, torch.bfloat16):
        pytest.skip("this torch has no variable-length attention")
    base = tiny_base()
    with packed_layout(base.model, Layout(batch.to(torch.device("cuda")), attention=way)):
        result, _ = packed_attention(base.model, *on_device, None)
    assert torch.allclose(result.cpu().double(), expected, atol=2e-2)
    exact = [tensor.float().requires_grad_() for tensor in inputs]
    wanted = torch.autograd.grad(row_by_row(*exact, batch).sum(), exact)
    found = torch.autograd.grad(result.float().sum(), on_device)
    for one, other in zip(found, wanted, strict=True):
        assert (one.cpu().float() - other).norm() <= 0.02 * other.norm()


def test_masks_are_shared_by_the_layers_of_a_pass_and_gone_after_it() -> None:
    base, batch = tiny_base(), batch_of((5, 0), 2)
    module = base.model.model.layers[0].self_attn  # type: ignore[union-attr]
    inputs = [heads(count, len(batch.ids), count).detach() for count in (4, 2, 2)]
    with packed_layout(base.model, Layout(batch, attention="rows")):
        layout = _layout.get()
        assert layout is not None
        packed_attention(module, *inputs, None)
        first = {kind: id(mask) for kind, mask in layout.masks.items()}
        packed_attention(module, *inputs, None)
        assert first == {kind: id(mask) for kind, mask in layout.masks.items()}
        sizes = {(segment.prefix, 0) for segment in batch.segments if segment.prefix}
        sizes |= {
            (length, segment.prefix) for segment in batch.segments for length in segment.lengths
        }
        assert {kind[:2] for kind in first} == sizes
        masks = [weakref.ref(mask) for mask in layout.masks.values()]
    del layout
    assert [mask() for mask in masks] == [None] * len(sizes)


def test_a_window_that_only_a_mask_would_know_of_is_refused() -> None:
    """Packed passes ask for no mask, so the architecture takes the padded path."""
    base, batch = tiny_base(), batch_of((5, 0), 2)
    module = base.model.model.layers[0].self_attn  # type: ignore[union-attr]
    inputs = [heads(count, len(batch.ids), count).detach() for count in (4, 2, 2)]
    with packed_layout(base.model, Layout(batch)):
        for name in ("sliding_window", "attention_chunk_size"):
            setattr(module.config, name, 4)
            with pytest.raises(NotImplementedError, match="window"):
                packed_attention(module, *inputs, None)
            setattr(module.config, name, None)
        module.config.sliding_window = 4
        packed_attention(
            module, *inputs, None, sliding_window=None
        )  # told that this layer has none
