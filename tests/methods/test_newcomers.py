"""What methods do for a client that comes once a run has begun, in numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedmira.adapters import Adapter, mix
from fedmira.config import ServerSettings
from fedmira.graphs import LearnedGraph
from fedmira.methods import (
    Ditto,
    FedFomo,
    Local,
    Method,
    MethodContext,
    Mira,
    Scaffold,
    ServerState,
    TwoLevel,
)
from lora_federation import context, dense, lora, replies, start, started

RANK = 4
ROWS = (10, 30, 50)
"""Of three founders and a newcomer: the last trains nowhere before it comes."""


def federation(count: int = 3, **changes: object) -> MethodContext:
    rows = [*ROWS, 20][:count]
    graph = LearnedGraph(nearest=1, warmup_rounds=9)  # nobody is moved in the rounds of a test
    return replace(context([RANK] * count, rows, graph, rounds=10), **changes)  # type: ignore[arg-type]


def update(seed: int) -> Adapter:
    """A product of rank 1, with room for others in the rank of the adapters."""
    thin = lora(1, seed)
    return mix([thin], [1.0], [1.0], RANK, 1.0, start(RANK)).adapter


def trained_and_joined(
    method: Method, few: MethodContext, many: MethodContext, trained: int = 2
) -> tuple[Method, ServerState, str]:
    """The first clients train once, to known updates, and one comes."""
    before = method.for_federation(few)
    state = started(before, few)
    sent = {client: update(k + 1) for k, client in enumerate(few.clients[:trained])}
    state = before.combine(state, replies(few, sent)).state
    after, newcomer = method.for_federation(many), many.clients[-1]
    starts = dict.fromkeys(many.clients, start(RANK))
    return after, after.joined(state, starts, [newcomer]), newcomer


@pytest.mark.parametrize("method", [Mira(coupling=0.5), FedFomo()])
def test_a_newcomer_begins_from_the_mean_of_what_was_trained_by_rows(method: Method) -> None:
    few, many = federation(), federation(4, came={"client-3": 2})
    after, state, newcomer = trained_and_joined(method, few, many)
    found = dense(after.instruct(state, newcomer).tensors["adapter"])
    one, other = dense(update(1)), dense(update(2))
    for module, product in found.items():
        torch.testing.assert_close(
            product, 0.25 * one[module] + 0.75 * other[module], atol=1e-5, rtol=1e-5
        )


def test_rows_that_nobody_believes_do_not_make_a_newcomer_begin_as_one_client() -> None:
    """30,000 rows among 10, 50 and 20 are far above the median, 35: they weigh as 35."""
    few, many = federation(), federation(4)
    rows = {"client-1": 30_000}
    server = ServerSettings(heaviest=100.0)
    few, many = (replace(each, rows={**each.rows, **rows}, server=server) for each in (few, many))
    after, state, newcomer = trained_and_joined(Mira(coupling=0.5), few, many)
    found = dense(after.instruct(state, newcomer).tensors["adapter"])
    one, other = dense(update(1)), dense(update(2))
    for module, product in found.items():
        wanted = (10 * one[module] + 35 * other[module]) / 45
        torch.testing.assert_close(product, wanted, atol=1e-5, rtol=1e-5)


def test_a_mean_of_fewer_than_may_be_mixed_is_not_handed_to_a_newcomer() -> None:
    few, many = federation(), federation(4)
    server = ServerSettings(least_mixed=3)
    few, many = (replace(each, server=server) for each in (few, many))
    for trained, fresh in ((2, True), (3, False)):
        after, state, newcomer = trained_and_joined(Mira(coupling=0.5), few, many, trained)
        sent = dense(after.instruct(state, newcomer).tensors["adapter"])
        assert all(bool((product == 0).all()) for product in sent.values()) is fresh
    # Of three that weigh 10, 30 and 50 rows the last would be more than a third.
    thirds = [dense(update(k + 1)) for k in range(3)]
    for module, product in sent.items():
        wanted = sum(of[module] for of in thirds) / 3
        torch.testing.assert_close(product, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [Local(), Mira(coupling=0.0)])
def test_where_every_client_is_alone_a_newcomer_is_too(method: Method) -> None:
    after, state, newcomer = trained_and_joined(method, federation(), federation(4))
    sent = after.instruct(state, newcomer).tensors["adapter"]
    assert all(torch.equal(sent[name], of) for name, of in start(RANK).items())


def test_a_personal_adapter_of_ditto_begins_at_the_shared_one() -> None:
    after, state, newcomer = trained_and_joined(Ditto(), federation(), federation(4))
    own, shared = after.adapter_for(state, newcomer), state.adapters["*common"]
    assert all(torch.equal(own[name], shared[name]) for name in shared)


def test_the_control_of_scaffold_stays_the_mean_over_all_rows_when_rows_come() -> None:
    """sum n_k c_k / n with 90 rows, and with 20 more of a client whose c_k is 0: 90 / 110."""
    few, many = federation(), federation(4)
    before = Scaffold().for_federation(few)
    state = started(before, few)
    control = {name: torch.full_like(of, 11.0) for name, of in start(RANK).items()}
    state = ServerState({**state.adapters, "control": control}, state.numbers)
    starts = dict.fromkeys(many.clients, start(RANK))
    after = Scaffold().for_federation(many).joined(state, starts, ["client-3"])
    assert all(bool((of == 9.0).all()) for of in after.adapters["control"].values())


def test_two_levels_send_a_newcomer_what_all_have_in_common() -> None:
    """C is the first round's mean of the updates by rows, as its first step is whole."""
    few, many = federation(), federation(4, came={"client-3": 2})
    after, state, newcomer = trained_and_joined(TwoLevel(), few, many, trained=3)
    sent = dense(after.instruct(state, newcomer).tensors["adapter"])
    updates = [dense(update(k + 1)) for k in range(3)]
    for module, product in sent.items():
        wanted = sum(rows / 90 * of[module] for rows, of in zip(ROWS, updates, strict=True))
        torch.testing.assert_close(product, wanted, atol=1e-5, rtol=1e-5)


def test_own_steps_of_two_levels_shrink_by_the_rounds_that_a_newcomer_has() -> None:
    """Of 10 rounds with h = 0.8 a founder's steps are whole up to its 8th; a newcomer in round 6
    has 5 left, so that from its 5th on they are 4 / t: D, 2 D, 3 D, 4 D, 4.8 D."""
    method = TwoLevel(common_rank=0, coupling=0.0, horizon=0.8)
    few, many = federation(1), federation(2, came={"client-1": 6})
    step, present = update(7), method.for_federation(few)
    state, reached = started(present, few), dict[str, list[float]]()
    clients: tuple[str, ...] = few.clients
    for number in range(1, 11):
        if number == 6:
            present, clients = method.for_federation(many), many.clients
            starts = dict.fromkeys(clients, start(RANK))
            state = present.joined(state, starts, ["client-1"])
        sent = {}
        for client in clients:
            begun = present.instruct(state, client).tensors["adapter"]
            sent[client] = mix([begun, step], [1.0, 1.0], [1.0, 1.0], RANK, 1.0, begun).adapter
        state = present.combine(state, replies(many, sent, number)).state
        for client in clients:
            product = dense(present.adapter_for(state, client))["m.q_proj"]
            share = float((product * dense(step)["m.q_proj"]).sum())
            share /= float(dense(step)["m.q_proj"].square().sum())
            reached.setdefault(client, []).append(share)
    assert reached["client-1"] == pytest.approx([1, 2, 3, 4, 4.8], rel=1e-4)
    assert reached["client-0"][:8] == pytest.approx([1, 2, 3, 4, 5, 6, 7, 8], rel=1e-4)
    assert reached["client-0"][8] == pytest.approx(8 + 8 / 9, rel=1e-4)
