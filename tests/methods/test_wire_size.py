"""Adapter sizes of the paper's Table II, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fedmira.messages import Payload


@pytest.mark.parametrize(
    ("layers", "rank", "shapes", "parameters"),
    [
        (24, 16, [(2048, 2048)], 1_572_864),
        (36, 8, [(3840, 1280), (1280, 1280), (1280, 5120)], 4_055_040),
    ],
    ids=["LLaMA-1.3B, q_proj, rank 16", "GPT-2 large, c_attn and both c_proj, rank 8"],
)
def test_bytes_are_four_times_rank_times_in_plus_out(
    layers: int, rank: int, shapes: Sequence[tuple[int, int]], parameters: int
) -> None:
    adapter = {}
    for layer in range(layers):
        for number, (out, into) in enumerate(shapes):
            adapter[f"{layer}.{number}.lora_A.weight"] = torch.empty(rank, into, device="meta")
            adapter[f"{layer}.{number}.lora_B.weight"] = torch.empty(out, rank, device="meta")
    assert layers * rank * sum(out + into for out, into in shapes) == parameters
    assert Payload({"adapter": adapter}).num_bytes == 4 * parameters
