"""FedAvg: hand-derived means, and one shape for all."""

from __future__ import annotations

import pytest
import torch

from fedmira.errors import ConfigError
from fedmira.graphs import FixedGraph, uniform_graph
from fedmira.messages import Payload, Reply
from fedmira.methods import FedAvg, MethodContext

CLIENTS = ("a", "b", "c")


def context(ranks: tuple[int, int, int]) -> MethodContext:
    return MethodContext(
        CLIENTS,
        dict.fromkeys(CLIENTS, 10),
        dict(zip(CLIENTS, ranks, strict=True)),
        16.0,
        FixedGraph(uniform_graph(CLIENTS)),
        3,
    )


def test_mean_is_weighted_by_rows() -> None:
    """(1 * 10 + 4 * 20 + 8 * 10) / 40 = 4.25, and (-2 * 10 + 0 * 20 + 6 * 10) / 40 = 1."""
    algorithm = FedAvg().for_federation(context((1, 1, 1)))
    begin = {"m.lora_A.weight": torch.zeros(1, 2), "m.lora_B.weight": torch.zeros(2, 1)}
    state = algorithm.initial_state(dict.fromkeys(CLIENTS, begin))
    replies = [
        Reply(
            client,
            1,
            rows,
            Payload(
                {
                    "adapter": {
                        "m.lora_A.weight": torch.full((1, 2), down),
                        "m.lora_B.weight": torch.full((2, 1), up),
                    }
                }
            ),
        )
        for client, rows, down, up in (
            ("a", 10, 1.0, -2.0),
            ("b", 20, 4.0, 0.0),
            ("c", 10, 8.0, 6.0),
        )
    ]
    after = algorithm.combine(state, replies).state
    for client in CLIENTS:
        adapter = algorithm.adapter_for(after, client)
        assert torch.equal(adapter["m.lora_A.weight"], torch.full((1, 2), 4.25))
        assert torch.equal(adapter["m.lora_B.weight"], torch.full((2, 1), 1.0))
    assert set(after.adapters) == {"shared"}


def test_different_ranks_are_refused_with_two_clients_named() -> None:
    with pytest.raises(ConfigError, match=r"client 'a' has rank 4 and client 'c' rank 8"):
        FedAvg().for_federation(context((4, 4, 8)))
