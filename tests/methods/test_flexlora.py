"""FlexLoRA: the dense mean cut to every client's rank, at every client's own scale."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from fedmira.adapters import digest, modules, scale
from fedmira.methods import FlexLora
from lora_federation import (
    ALPHA,
    SMALL,
    best_of_rank,
    context,
    dense,
    lora,
    names,
    replies,
    started,
)

SETTINGS = FlexLora()
RANKS, ROWS = [4, 8, 16, 32], [10, 40, 30, 20]
SHAPES: dict[str, Mapping[str, tuple[int, int]]] = {
    "factors thinner than the matrix": {"q_proj": (80, 72), "v_proj": (96, 64)},
    "as many directions as the matrix has": {"q_proj": (40, 56), "v_proj": (36, 40)},
}


@pytest.mark.parametrize("case", SHAPES)
def test_ranks_4_8_16_32_equal_the_dense_mean_cut_to_each_rank(case: str) -> None:
    shapes = SHAPES[case]
    federation = context(RANKS, ROWS)
    algorithm = SETTINGS.for_federation(federation)
    adapters = {client: lora(rank, 10 + rank, shapes) for client, rank in federation.ranks.items()}
    state = algorithm.combine(
        started(algorithm, federation, shapes), replies(federation, adapters)
    ).state
    full = {
        client: dense(adapter, scale(ALPHA, federation.ranks[client]))
        for client, adapter in adapters.items()
    }
    for client, rank in federation.ranks.items():
        given = algorithm.adapter_for(state, client)
        assert {name: tensor.shape for name, tensor in given.items()} == {
            n: t.shape for n, t in adapters[client].items()
        }
        for name, found in dense(given, scale(ALPHA, rank)).items():
            mean = sum(
                rows / 100 * full[other][name]
                for other, rows in zip(federation.clients, ROWS, strict=True)
            )
            best = best_of_rank(mean, rank)
            torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-5 * float(best.abs().max()))


def test_all_singular_values_are_in_b_and_rows_of_a_are_orthonormal() -> None:
    federation = context([4, 8])
    algorithm = SETTINGS.for_federation(federation)
    adapters = {client: lora(rank, rank) for client, rank in federation.ranks.items()}
    state = algorithm.combine(started(algorithm, federation), replies(federation, adapters)).state
    for client, rank in federation.ranks.items():
        for down, up in modules(algorithm.adapter_for(state, client)).values():
            torch.testing.assert_close(down @ down.T, torch.eye(rank), rtol=0, atol=1e-5)
            norms = up.norm(dim=0)
            assert bool((norms[:-1] >= norms[1:] - 1e-5).all()), (
                "the strongest direction comes first"
            )


def test_clients_of_ranks_4_and_16_with_the_same_update_average_to_that_update() -> None:
    """Rank 16 holds alpha / 4 B A with B times 4 and zeros in the other directions.

    Forgetting a scale would move it by a factor of 4.
    """
    federation = context([4, 16])
    algorithm = SETTINGS.for_federation(federation)
    few = lora(4, 3)
    many = {
        name: torch.cat([tensor, torch.randn(12, tensor.shape[1])])
        if ".lora_A." in name
        else torch.cat([4 * tensor, torch.zeros(len(tensor), 12)], dim=1)
        for name, tensor in few.items()
    }
    state = algorithm.combine(
        started(algorithm, federation), replies(federation, {"client-0": few, "client-1": many})
    ).state
    for client, rank in federation.ranks.items():
        for name, found in dense(algorithm.adapter_for(state, client), scale(ALPHA, rank)).items():
            torch.testing.assert_close(
                found, dense(few, scale(ALPHA, 4))[name], rtol=1e-5, atol=1e-5
            )


def test_truncation_is_the_norm_of_what_the_largest_rank_cannot_hold() -> None:
    federation = context([4, 4, 4])
    algorithm = SETTINGS.for_federation(federation)
    adapters = {client: lora(4, seed) for seed, client in enumerate(names(3), start=1)}
    combined = algorithm.combine(started(algorithm, federation), replies(federation, adapters))
    squares = 0.0
    for name in dense(adapters["client-0"]):
        mean = sum(dense(adapter, scale(ALPHA, 4))[name] for adapter in adapters.values()) / 3
        squares += float(torch.linalg.svdvals(mean)[4:].square().sum())
    assert combined.diagnostics.round["truncation"] == pytest.approx(squares**0.5, rel=1e-6)


def test_when_nobody_moved_everybody_keeps_the_start() -> None:
    federation = context([2, 6])
    algorithm = SETTINGS.for_federation(federation)
    state = started(algorithm, federation)
    idle = {client: algorithm.adapter_for(state, client) for client in federation.clients}
    after = algorithm.combine(state, replies(federation, idle)).state
    for client in federation.clients:
        assert digest(algorithm.adapter_for(after, client)) == digest(idle[client])


def test_clients_outside_the_round_are_given_the_new_update_too() -> None:
    federation = context([2, 4, 3])
    algorithm = SETTINGS.for_federation(federation)
    state = algorithm.combine(
        started(algorithm, federation), replies(federation, {"client-0": lora(2, 5)})
    ).state
    for client, rank in federation.ranks.items():
        for name, found in dense(algorithm.adapter_for(state, client), scale(ALPHA, rank)).items():
            torch.testing.assert_close(
                found, dense(lora(2, 5), scale(ALPHA, 2))[name], rtol=1e-5, atol=1e-5
            )


def test_a_round_sends_each_client_its_own_rank() -> None:
    federation = context([2, 8])
    algorithm = SETTINGS.for_federation(federation)
    state = started(algorithm, federation)
    per_direction = 4 * sum(out + into for out, into in SMALL.values())
    assert [algorithm.instruct(state, client).num_bytes for client in federation.clients] == [
        2 * per_direction,
        8 * per_direction,
    ]
