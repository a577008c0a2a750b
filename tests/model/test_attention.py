"""Packed attention: every kernel gives what full attention over each row by itself gives.

Values and gradients.
"""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmira.model.packed.attention import (
    Layout,
    _attend_by_row,
    _layout,
    packed_attention,
    packed_layout,
)
from fedmira.model.packed.cpu import attend_on_cpu, plan_for_cpu
from fedmira.model.packed.packing import PackedBatch, pack, segment_rows
from fedmira.model.packed.varlen import sequences_of, varlen_available
from tiny import draw_rows, tiny_base

SIZE = 8


def batch_of(shared: tuple[int, ...], seed: int, longest: int = 9) -> PackedBatch:
    """One segment for each entry: that many shared tokens, and a few rows."""
    parts = [
        segment_rows(k, draw_rows(1 + (seed + k) % 4, count, seed + k, longest=longest), 10_000)
        for k, count in enumerate(shared)
    ]
    return pack([segment for part in parts for segment in part])


def heads(count: int, tokens: int, seed: int) -> Tensor:
    return torch.randn(
        1, count, tokens, SIZE, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()


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
            keys = sequences.keys[sequences.key_ends[number] : sequences.key_ends[number + 1]]
            assert keys.tolist() == seen
            assert (
                list(
                    range(int(sequences.query_ends[number]), int(sequences.query_ends[number + 1]))
                )
                == own
            )
            number += 1
    assert number == len(sequences.query_ends) - 1


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"
)
@pytest.mark.parametrize("shared", [(20, 0, 7)])
def test_the_cuda_kernel_equals_attention_of_each_row_by_itself(shared: tuple[int, ...]) -> None:
    batch = batch_of(shared, 4, longest=40)
    inputs = [heads(count, len(batch.ids), count).detach().bfloat16() for count in (4, 2, 2)]
    expected = row_by_row(*(tensor.float() for tensor in inputs), batch)
    on_device = [tensor.cuda().requires_grad_() for tensor in inputs]
    if not varlen_available(on_device[0]):
        pytest.skip("this torch has no variable-length attention")
    base = tiny_base()
    with packed_layout(base.model, Layout(batch.to(torch.device("cuda")))):
        result, _ = packed_attention(base.model, *on_device, None)
    assert torch.allclose(result.cpu().double(), expected, atol=2e-2)
    result.float().sum().backward()
    assert all(
        tensor.grad is not None and bool(torch.isfinite(tensor.grad).all()) for tensor in on_device
    )


def test_masks_are_shared_by_the_layers_of_a_pass_and_gone_after_it() -> None:
    base, batch = tiny_base(), batch_of((5, 0), 2)
    module = base.model.model.layers[0].self_attn  # type: ignore[union-attr]
    inputs = [heads(count, len(batch.ids), count).detach() for count in (4, 2, 2)]
    with packed_layout(base.model, Layout(batch, kernels=False)):
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
