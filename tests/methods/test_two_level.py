"""Two levels, held against the equations on dense matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmira.adapters import Adapter, mix, modules, scale
from fedmira.adapters.low_rank import LEAST_TURNED
from fedmira.config import load_config
from fedmira.errors import ConfigError
from fedmira.graphs import FixedGraph, GraphSource, LearnedGraph, random_graph, uniform_graph
from fedmira.messages import Payload, Reply
from fedmira.methods import Method, MethodContext, Mira, ServerState, TwoLevel

OUT, INTO, ALPHA = 40, 36, 8.0
Dense = Tensor


def names(count: int) -> tuple[str, ...]:
    return tuple(f"client-{k}" for k in range(count))


def lora(rank: int, seed: int, fresh: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(OUT, rank, generator=generator)
    return {
        "m.lora_A.weight": torch.randn(rank, INTO, generator=generator) / INTO**0.5,
        "m.lora_B.weight": torch.zeros(OUT, rank) if fresh else up / OUT**0.5,
    }


def dense(adapter: Adapter, rank: int) -> Dense:
    ((down, up),) = modules(adapter).values()
    return scale(ALPHA, rank) * up.double() @ down.double()


def context(
    graph: GraphSource, count: int, ranks: Sequence[int] | None = None, rows: Sequence[int] = ()
) -> MethodContext:
    clients = names(count)
    return MethodContext(
        clients=clients,
        rows=dict(zip(clients, rows or [20] * count, strict=True)),
        ranks=dict(zip(clients, ranks or [3] * count, strict=True)),
        alpha=ALPHA,
        graph=graph,
        cohort=count,
        rounds=9,
    )


def begun(method: Method, federation: MethodContext) -> tuple[Method, ServerState]:
    bound = method.for_federation(federation)
    start = lora(federation.largest_rank, 0, fresh=True)
    starts = {
        client: {
            name: tensor[:rank] if "lora_A" in name else tensor[:, :rank]
            for name, tensor in start.items()
        }
        for client, rank in federation.ranks.items()
    }
    return bound, bound.initial_state(starts)


def replies(federation: MethodContext, adapters: Mapping[str, Adapter], number: int) -> list[Reply]:
    return [
        Reply(client, number, federation.rows[client], Payload({"adapter": adapters[client]}))
        for client in sorted(adapters)
    ]


def cut(matrix: Dense, rank: int) -> Dense:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize("ranks", [[3] * 4, [3, 2, 3, 1]], ids=["one rank", "ranks of their own"])
def test_rounds_are_those_of_the_equations(ranks: list[int]) -> None:
    """Clients come and go; parts are so wide that only the client's own rank cuts."""
    graph = random_graph(names(4), 1)
    federation = context(FixedGraph(graph), 4, ranks, rows=[10, 20, 30, 40])
    method = TwoLevel(coupling=0.8, size_scale=0, horizon=1 / 3, common_rank=12)
    bound, state = begun(method, federation)
    clients = federation.clients
    common = torch.zeros(OUT, INTO, dtype=torch.float64)
    own = {client: torch.zeros(OUT, INTO, dtype=torch.float64) for client in clients}
    turns = dict.fromkeys(clients, 0)
    trained_ever: set[str] = set()
    cohorts = [(0, 1, 2), (1, 3), (0, 1, 2, 3), (1, 2), (1, 3)]
    for number, cohort in enumerate(cohorts, start=1):
        present = [clients[k] for k in cohort]
        sent = {client: bound.adapter_for(state, client) for client in present}
        new = {
            client: lora(federation.ranks[client], 100 * number + k)
            for k, client in zip(cohort, present, strict=True)
        }
        total = sum(federation.rows[client] for client in present)
        shares = {client: federation.rows[client] / total for client in present}
        added = {
            client: dense(new[client], federation.ranks[client])
            - dense(sent[client], federation.ranks[client])
            for client in present
        }
        mean = sum((shares[client] * added[client] for client in present), torch.zeros(()))
        squares = sum(share**2 for share in shares.values())
        common = common + min(1.0, 2 / (number * squares)) * mean
        for client in present:
            turns[client] += 1
            step = min(1.0, 3 / turns[client])  # a third of 9 rounds, as the context says
            own[client] = own[client] + step * (added[client] - mean)
        trained_ever |= set(present)
        weights, gamma = graph.matrix(), 0.8 / float(graph.degrees.max())
        before = dict(own)
        for k in cohort:
            pulled = torch.zeros(OUT, INTO, dtype=torch.float64)
            for other in range(4):
                if clients[other] in trained_ever and other != k:
                    way = before[clients[other]] - before[clients[k]]
                    pulled = pulled + gamma * float(weights[k, other]) * way
            own[clients[k]] = cut(before[clients[k]] + pulled, 2 * federation.ranks[clients[k]])
        state = bound.combine(state, replies(federation, new, number)).state
        for client in clients:
            rank = federation.ranks[client]
            expected = cut(common + own[client], rank)
            found = dense(bound.adapter_for(state, client), rank)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert bound.instruct(state, client).tensors["adapter"].keys() == found_keys()


def found_keys() -> Any:
    return lora(1, 0).keys()


def test_full_rounds_without_shrinking_steps_are_mira() -> None:
    """a = b = 1, everybody in every round of a short run, ranks that cut nothing."""
    graph = FixedGraph(random_graph(names(3), 2))
    federation = context(graph, 3, [12, 12, 12])
    ours, state = begun(TwoLevel(coupling=0.7, size_scale=0, horizon=1), federation)
    theirs, other = begun(Mira(coupling=0.7, size_scale=0), federation)
    for number in (1, 2):
        step = {client: lora(2, 10 * number + k) for k, client in enumerate(federation.clients)}
        moved = []
        for method, before in ((ours, state), (theirs, other)):
            adapters = {
                client: mix(
                    [method.adapter_for(before, client), step[client]],
                    [1.0, 1.0],
                    [1.0, 1.0],
                    12,
                    1.0,
                    method.adapter_for(before, client),
                ).adapter
                for client in federation.clients
            }
            moved.append(method.combine(before, replies(federation, adapters, number)).state)
        state, other = moved
        for client in federation.clients:
            torch.testing.assert_close(
                dense(ours.adapter_for(state, client), 12),
                dense(theirs.adapter_for(other, client), 12),
                rtol=1e-3,
                atol=1e-4,
            )


def test_the_control_is_local_training_with_shrinking_steps() -> None:
    """Nothing common and nobody aligned: each client is the sum of its own steps."""
    federation = context(FixedGraph(uniform_graph(names(3))), 3, [9, 9, 9])
    method, state = begun(TwoLevel(coupling=0, common_rank=0, horizon=1 / 3), federation)
    assert not method.aligns
    client = federation.clients[1]
    expected = torch.zeros(OUT, INTO, dtype=torch.float64)
    for number, step in enumerate((1, 1, 1, 3 / 4, 3 / 5), start=1):
        before = dense(method.adapter_for(state, client), 9)
        new = {name: lora(4, 7 * number + k) for k, name in enumerate(federation.clients)}
        full = {
            name: mix(
                [method.adapter_for(state, name), each], [1, 1], [1, 9 / 4], 9, 1, each_of(9)
            ).adapter
            for name, each in new.items()
        }
        expected = expected + step * (dense(full[client], 9) - before)
        combined = method.combine(state, replies(federation, full, number))
        state = combined.state
        assert all(told["pull"] == 0 for told in combined.diagnostics.clients.values())
        found = dense(method.adapter_for(state, client), 9)
        torch.testing.assert_close(found, cut(expected, 9), rtol=1e-3, atol=1e-4)


def each_of(rank: int) -> Adapter:
    return lora(rank, 5)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 5), parts=st.integers(1, 3))
def test_a_turned_sum_is_the_nearest_product_and_its_down_factor_is_not_weak(
    seed: int, rank: int, parts: int
) -> None:
    adapters = [lora(rank + 1, seed + k) for k in range(parts)]
    last = lora(rank, seed + 50)
    weights = [0.7, -0.4, 1.3][:parts]
    made = mix(adapters, weights, [2.0] * parts, rank, 0.5, last, split="turned").adapter
    total = sum(
        (
            2.0 * weight * each["m.lora_B.weight"].double() @ each["m.lora_A.weight"].double()
            for weight, each in zip(weights, adapters, strict=True)
        ),
        torch.zeros(()),
    )
    down, up = made["m.lora_A.weight"].double(), made["m.lora_B.weight"].double()
    torch.testing.assert_close(0.5 * up @ down, cut(total, rank), rtol=1e-4, atol=1e-5)
    assert float(torch.linalg.svdvals(down).min()) >= LEAST_TURNED * (1 - 1e-5)


def test_a_sum_of_the_last_adapter_alone_keeps_its_factors() -> None:
    """Where A's singular values are above the floor, the gauge is the client's own."""
    last = lora(3, 1)
    last["m.lora_A.weight"] *= 3
    made = mix([last], [1.0], [1.0], 3, 1.0, last, split="turned").adapter
    for name, tensor in last.items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-4, atol=1e-5)


def test_an_absent_client_has_the_newest_common_part() -> None:
    federation = context(FixedGraph(uniform_graph(names(3))), 3)
    method, state = begun(TwoLevel(), federation)
    first, second, absent = federation.clients
    state = method.combine(state, replies(federation, {first: lora(3, 1)}, 1)).state
    once = dense(method.adapter_for(state, absent), 3)
    assert float(once.norm()) > 0  # it never trained, and has what is common
    state = method.combine(state, replies(federation, {second: lora(3, 2)}, 2)).state
    assert not torch.equal(dense(method.adapter_for(state, absent), 3), once)


def test_unrelated_clients_share_nothing_but_the_common_part() -> None:
    federation = context(LearnedGraph(warmup_rounds=0), 8)
    method, state = begun(TwoLevel(size_scale=0), federation)
    for number in (1, 2, 3):
        new = {name: lora(3, 10 * k + 1) for k, name in enumerate(federation.clients)}
        combined = method.combine(state, replies(federation, new, number))
        state = combined.state
        pulls = [told["pull"] for told in combined.diagnostics.clients.values()]
        assert sum(pulls) / len(pulls) < 0.02
        assert {"cosine_noise", "cosine_largest", "cosine_mean"} <= set(combined.diagnostics.round)


def test_pulls_do_not_make_a_graph_of_themselves() -> None:
    """What training added is compared, so that clients which a server mixes look no more alike."""
    federation = context(LearnedGraph(warmup_rounds=0), 6)
    method, state = begun(Mira(), federation)
    generator = torch.Generator().manual_seed(3)
    for number in range(1, 6):
        new = {}
        for client in federation.clients:
            before = method.adapter_for(state, client)
            noise = lora(1, int(torch.randint(10**6, (), generator=generator)))
            new[client] = mix([before, noise], [1.0, 1.0], [1.0, 3.0], 3, 1.0, before).adapter
        combined = method.combine(state, replies(federation, new, number))
        state = combined.state
    assert combined.diagnostics.round["cosine_largest"] < 0.4
    pulls = [told["pull"] for told in combined.diagnostics.clients.values()]
    assert sum(pulls) / 6 < 0.1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adapter.kind=prompt"], "algorithm.name = 'two-level'"),
        (["local.optimizer_state=kept"], "local.optimizer_state = 'fresh'"),
        (["algorithm.safeguard=true", "data.validation_fraction=0"], "algorithm.safeguard = true"),
        (
            ["algorithm.safeguard=true", "algorithm.coupling=0", "algorithm.common_rank=0"],
            "the server changes nothing",
        ),
        (["algorithm.horizon=0"], "above 0"),
        (["algorithm.horizon=2"], "1 or less"),
    ],
)
def test_what_does_not_go_with_it_is_said(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(overrides=["algorithm.name=two-level", *overrides])
