"""HetLoRA: padding and cutting, weights by the size of the updates, hand-derived means."""

from __future__ import annotations

import pytest
import torch

from fedmira.adapters import digest, truncate_rank
from fedmira.algorithms import build
from fedmira.algorithms.hetlora import padded
from fedmira.config.methods import HetLoraSettings
from lora_federation import context, dense, lora, replies, start, started

SETTINGS = HetLoraSettings(name="hetlora")


def test_padding_changes_no_update_and_cutting_takes_it_back() -> None:
    adapter = lora(3, 1)
    wide = padded(adapter, 7)
    assert digest(truncate_rank(wide, 3)) == digest(adapter)
    for name, matrix in dense(wide).items():
        torch.testing.assert_close(matrix, dense(adapter)[name])


def test_factors_are_averaged_by_norm_and_cut_to_each_rank() -> None:
    """|B A| is 3 * 1 = 3 for the first client and |diag(4, 0) + diag(0, 4)| = sqrt(32) for the second; rows of data do not count."""
    federation = context([1, 2], [1000, 1])
    algorithm = build(SETTINGS, federation)
    one = {"m.lora_A.weight": torch.tensor([[1.0, 0.0]]), "m.lora_B.weight": torch.tensor([[3.0], [0.0]])}
    two = {"m.lora_A.weight": 2 * torch.eye(2), "m.lora_B.weight": 2 * torch.eye(2)}
    begin = {"m.lora_A.weight": torch.ones(2, 2), "m.lora_B.weight": torch.zeros(2, 2)}
    state = algorithm.initial_state({"client-0": truncate_rank(begin, 1), "client-1": begin})
    after = algorithm.combine(state, replies(federation, {"client-0": one, "client-1": two})).state
    first = 3 / (3 + 32**0.5)
    second = 1 - first
    expected = {
        "m.lora_A.weight": torch.tensor([[first + 2 * second, 0.0], [0.0, 2 * second]]),
        "m.lora_B.weight": torch.tensor([[3 * first + 2 * second, 0.0], [0.0, 2 * second]]),
    }
    for client, rank in federation.ranks.items():
        for name, found in algorithm.adapter_for(after, client).items():
            torch.testing.assert_close(found, truncate_rank(expected, rank)[name])


def test_when_nobody_moved_the_weights_are_equal_and_finite() -> None:
    federation = context([3, 3, 3])
    algorithm = build(SETTINGS, federation)
    idle = dict.fromkeys(federation.clients, start(3))
    after = algorithm.combine(started(algorithm, federation), replies(federation, idle)).state
    for name, found in algorithm.adapter_for(after, "client-0").items():
        torch.testing.assert_close(found, start(3)[name])


def test_a_client_sends_and_gets_its_own_rank() -> None:
    federation = context([2, 5])
    algorithm = build(SETTINGS, federation)
    state = started(algorithm, federation)
    few, many = (algorithm.instruct(state, client).num_bytes for client in federation.clients)
    assert few / many == pytest.approx(2 / 5)
