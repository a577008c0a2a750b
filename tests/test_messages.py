"""Tensors of all parts lie under flat names and come back, with parts that have none."""

from __future__ import annotations

import torch

from fedmira.messages import flattened, in_parts


def test_parts_come_back_from_their_flat_names() -> None:
    first, second = torch.ones(2), torch.zeros(3)
    tensors = {"mean": {"layer.a": first}, "square": {"layer.a": second, "b|c": first}, "none": {}}
    flat = flattened(tensors)
    assert list(flat) == ["mean|layer.a", "square|layer.a", "square|b|c"]
    assert flat["mean|layer.a"] is first
    assert in_parts(flat, tensors) == tensors
