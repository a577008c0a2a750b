"""FedALT: the rest of the world excludes the client and is frozen.

It is weighted by the graph, and never overwrites the own part.
"""

from __future__ import annotations

import pytest
import torch

from fedmira.adapters import Adapter, digest, scale
from fedmira.errors import ConfigError
from fedmira.graphs import (
    FixedGraph,
    Graph,
    LearnedGraph,
    category_graph,
)
from fedmira.methods import FedAlt
from fedmira.methods.parts.rank_split import RankSplit
from lora_federation import best_of_rank, context, dense, lora, names, play, start, started

SPLIT = RankSplit(2)
CENTRES = {client: lora(8, 70 + k) for k, client in enumerate(names(4))}
SETTINGS = FedAlt(trained_rank=2, rest_share=0.5)


def own(adapter: Adapter) -> Adapter:
    return SPLIT.trained(adapter)


def test_the_rest_is_half_the_mean_of_the_other_clients_own_parts() -> None:
    """Three others of rank 2 fit into the 6 directions of the frozen part."""
    federation = context([8] * 4)
    algorithm = SETTINGS.for_federation(federation)
    state, sent = play(algorithm, federation, started(algorithm, federation), CENTRES, 1)
    parts = {reply.client_id: own(reply.payload.tensors["adapter"]) for reply in sent}
    for client in names(4):
        given = algorithm.instruct(state, client).tensors["adapter"]
        assert digest(own(given)) == digest(parts[client])
        for module, rest in dense(SPLIT.frozen(given)).items():
            expected = (
                0.5
                * sum(dense(part)[module] for other, part in parts.items() if other != client)
                / 3
            )
            torch.testing.assert_close(
                rest, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
            )


@pytest.mark.parametrize(("rank", "fits"), [(4, False), (8, True)])
def test_truncation_is_the_norm_of_what_the_frozen_parts_of_the_round_leave_out(
    rank: int, fits: bool
) -> None:
    """Three others of rank 2 need 6 directions.

    A client of rank 4 has 2 of them, one of rank 8 all 6. A dense reference in float64.
    """
    federation = context([rank] * 4)
    algorithm = SETTINGS.for_federation(federation)
    centres = {client: lora(rank, 70 + k) for k, client in enumerate(names(4))}
    state, sent = play(algorithm, federation, started(algorithm, federation), centres, 1)
    first = algorithm.combine(started(algorithm, federation), sent).diagnostics.round["truncation"]
    assert first == 0.0, "nobody had trained before, so there was nothing to leave out"
    parts = {
        reply.client_id: dense(own(reply.payload.tensors["adapter"]), scale(16.0, rank))
        for reply in sent
    }
    squares = whole = 0.0
    for client in names(2):
        held = dense(
            SPLIT.frozen(algorithm.instruct(state, client).tensors["adapter"]), scale(16.0, rank)
        )
        for module, matrix in held.items():
            exact = 0.5 * sum(part[module] for other, part in parts.items() if other != client) / 3
            torch.testing.assert_close(matrix, best_of_rank(exact, rank - 2), rtol=1e-5, atol=1e-5)
            squares += float((exact - matrix).square().sum())
            whole += float(exact.square().sum())
    _, some = play(
        algorithm, federation, state, {client: centres[client] for client in names(2)}, 2
    )
    found = algorithm.combine(state, some).diagnostics.round["truncation"]
    assert found == pytest.approx(squares**0.5, rel=1e-6, abs=1e-6 * whole**0.5)
    assert (squares < 1e-10 * whole) == fits and (found < 1e-5 * whole**0.5) == fits


def test_ranks_may_differ_and_every_client_has_its_own_scale() -> None:
    federation = context([4, 8, 12])
    algorithm = SETTINGS.for_federation(federation)
    centres = {client: lora(rank, rank) for client, rank in federation.ranks.items()}
    state, sent = play(algorithm, federation, started(algorithm, federation), centres, 1)
    given = algorithm.instruct(state, "client-2").tensors["adapter"]
    for module, rest in dense(SPLIT.frozen(given), scale(16.0, 12)).items():
        one = dense(own(sent[0].payload.tensors["adapter"]), scale(16.0, 4))[module]
        other = dense(own(sent[1].payload.tensors["adapter"]), scale(16.0, 8))[module]
        torch.testing.assert_close(rest, 0.25 * (one + other), rtol=1e-5, atol=1e-5)


def test_weights_follow_the_graph_and_leave_out_clients_that_never_trained() -> None:
    graph = Graph.from_edges(
        "file",
        names(4),
        [
            ("client-0", "client-1", 3.0),
            ("client-0", "client-2", 1.0),
            ("client-0", "client-3", 9.0),
        ],
    )
    federation = context([8] * 4, graph=FixedGraph(graph))
    algorithm = SETTINGS.for_federation(federation)
    some = {client: CENTRES[client] for client in names(3)}
    state, sent = play(algorithm, federation, started(algorithm, federation), some, 1)
    parts = [dense(own(reply.payload.tensors["adapter"])) for reply in sent]
    for module, rest in dense(
        SPLIT.frozen(algorithm.instruct(state, "client-0").tensors["adapter"])
    ).items():
        torch.testing.assert_close(
            rest, 0.5 * (0.75 * parts[1][module] + 0.25 * parts[2][module]), rtol=1e-5, atol=1e-5
        )
    for module, rest in dense(
        SPLIT.frozen(algorithm.instruct(state, "client-3").tensors["adapter"])
    ).items():
        torch.testing.assert_close(rest, 0.5 * parts[0][module], rtol=1e-5, atol=1e-5)


def test_training_moves_the_own_part_only_and_what_is_kept_is_what_was_trained() -> None:
    federation = context([8] * 4)
    algorithm = SETTINGS.for_federation(federation)
    state, _ = play(algorithm, federation, started(algorithm, federation), CENTRES, 1)
    given = {client: algorithm.instruct(state, client).tensors["adapter"] for client in names(4)}
    after, sent = play(algorithm, federation, state, CENTRES, 2)
    for reply in sent:
        trained = reply.payload.tensors["adapter"]
        assert digest(SPLIT.frozen(trained)) == digest(SPLIT.frozen(given[reply.client_id]))
        assert digest(own(trained)) != digest(own(given[reply.client_id]))
        assert digest(algorithm.adapter_for(after, reply.client_id)) == digest(trained)


def test_up_travels_the_own_part_and_down_the_rest() -> None:
    federation = context([8] * 4)
    algorithm = SETTINGS.for_federation(federation)
    state = started(algorithm, federation)
    per_direction = 4 * sum(tensor.numel() for tensor in lora(1, 0).values())
    assert algorithm.instruct(state, "client-0").num_bytes == 6 * per_direction
    assert (
        play(algorithm, federation, state, CENTRES, 1)[1][0].payload.num_bytes == 2 * per_direction
    )


def test_a_learned_graph_acts_after_its_warm_up_and_joins_clients_of_a_kind() -> None:
    """Even and odd clients are drawn to two different updates."""
    federation = context([8] * 6, graph=LearnedGraph(nearest=2, warmup_rounds=1), rounds=4)
    algorithm = FedAlt(trained_rank=4).for_federation(federation)
    kinds = [lora(8, 1), lora(8, 2)]
    noise = {client: lora(8, 90 + k) for k, client in enumerate(names(6))}
    centres = {
        c: {n: t + 0.1 * noise[c][n] for n, t in kinds[k % 2].items()}
        for k, c in enumerate(names(6))
    }
    state = started(algorithm, federation)
    for module in dense(algorithm.instruct(state, "client-0").tensors["adapter"]).values():
        assert not bool(module.any())
    state, sent = play(algorithm, federation, state, centres, 1)
    graph = algorithm.combine(state, sent).diagnostics.graph
    assert graph is not None
    assert all((int(one[-1]) - int(other[-1])) % 2 == 0 for one, other, _ in graph.edges())
    split = RankSplit(4)
    rest = split.frozen(algorithm.instruct(state, "client-0").tensors["adapter"])
    assert any(bool(matrix.any()) for matrix in dense(rest).values())
    assert algorithm.instruct(state, "client-0").num_bytes == 4 * sum(
        tensor.numel() for tensor in lora(4, 0).values()
    )


@pytest.mark.parametrize("count", [1, 3])
def test_nobody_to_learn_from_is_refused(count: int) -> None:
    clients = names(count)
    alone = FixedGraph(category_graph(clients, dict(zip(clients, "xyz", strict=False))))
    with pytest.raises(ConfigError, match="has no edge, so nobody has a rest of the world"):
        SETTINGS.for_federation(context([8] * count, graph=alone))


HALF = RankSplit(0)


def test_the_rest_in_factors_has_the_means_of_the_others_a_and_b_apart() -> None:
    """On the uniform graph without weights, whatever rows the others have, and at any number."""
    federation = context([6] * 4, [5, 10, 20, 40])
    algorithm = FedAlt(rest_space="factor", rest_share=0.7).for_federation(federation)
    centres = {client: lora(6, 70 + k) for k, client in enumerate(names(4))}
    state, sent = play(algorithm, federation, started(algorithm, federation), centres, 1)
    parts = {r.client_id: HALF.trained(r.payload.tensors["adapter"]) for r in sent}
    for client in names(4):
        given = algorithm.instruct(state, client).tensors["adapter"]
        assert digest(HALF.trained(given)) == digest(parts[client])
        others = [part for other, part in parts.items() if other != client]
        for name, rest in HALF.frozen(given).items():
            mean = torch.stack([part[name].double() for part in others]).mean(dim=0)
            expected = mean if ".lora_A." in name else 0.7 * mean
            torch.testing.assert_close(rest.double(), expected, rtol=1e-6, atol=1e-6)
    assert "truncation" not in algorithm.combine(state, sent).diagnostics.round


def test_factors_of_clients_that_never_trained_are_left_out() -> None:
    federation = context([6] * 3)
    algorithm = FedAlt(rest_space="factor").for_federation(federation)
    state = started(algorithm, federation)
    state, sent = play(algorithm, federation, state, {"client-1": lora(6, 1)}, 1)
    part = HALF.trained(sent[0].payload.tensors["adapter"])
    for name, rest in HALF.frozen(algorithm.instruct(state, "client-0").tensors["adapter"]).items():
        expected = part[name] if ".lora_A." in name else 0.5 * part[name]
        torch.testing.assert_close(rest, expected, rtol=1e-6, atol=1e-6)
    alone = HALF.frozen(algorithm.instruct(state, "client-1").tensors["adapter"])
    assert digest(alone) == digest(HALF.frozen(start(6))), "nobody else has trained"


def test_learned_shares_begin_at_a_half_sum_to_one_and_are_taken_out_of_what_others_are_given() -> (
    None
):
    federation = context([6] * 3)
    algorithm = FedAlt(rest_space="factor", learned_share=True, share_rate=0.1).for_federation(
        federation
    )
    centres = {client: lora(6, 70 + k) for k, client in enumerate(names(3))}
    state = started(algorithm, federation)
    assert state.numbers["own_share"].tolist() == [0.5] * 3
    state, _ = play(algorithm, federation, state, centres, 1)
    assert state.numbers["own_share"].tolist() == [0.5] * 3, "there was no rest of the world yet"
    for number in (2, 3):
        before = state
        state, sent = play(algorithm, federation, before, centres, number)
        parts = {}
        for reply, share in zip(sent, before.numbers["own_share"].tolist(), strict=True):
            begun = algorithm.instruct(before, reply.client_id).tensors["adapter"]
            ended, after = reply.payload.tensors["adapter"], reply.payload.scalars["own_share"]
            assert abs(after - share) > 0.01
            for name, rest in HALF.frozen(ended).items():
                held = HALF.frozen(begun)[name]
                expected = held if ".lora_A." in name else (1 - after) / (1 - share) * held
                torch.testing.assert_close(rest, expected, rtol=1e-5, atol=1e-7)
            parts[reply.client_id] = {
                name: part if ".lora_A." in name else part / after
                for name, part in HALF.trained(ended).items()
            }
        for k, client in enumerate(names(3)):
            share = float(state.numbers["own_share"][k])
            given = HALF.frozen(algorithm.instruct(state, client).tensors["adapter"])
            for name, rest in given.items():
                mean = sum(part[name] for other, part in parts.items() if other != client) / 2
                expected = mean if ".lora_A." in name else (1 - share) * mean
                torch.testing.assert_close(rest, expected, rtol=1e-5, atol=1e-6)
    told = algorithm.combine(before, sent).diagnostics.clients
    assert [told[c]["own_share"] for c in names(3)] == state.numbers["own_share"].tolist()


def test_with_a_learned_share_truncation_is_what_the_products_leave_out() -> None:
    """Two others of rank 2 need 4 directions; a client of rank 4 has 2 of them."""
    federation = context([4] * 3)
    algorithm = FedAlt(learned_share=True, share_rate=0.1).for_federation(federation)
    centres = {client: lora(4, 70 + k) for k, client in enumerate(names(3))}
    state, sent = play(algorithm, federation, started(algorithm, federation), centres, 1)
    parts = [dense(HALF.trained(r.payload.tensors["adapter"]), 2 * 4.0) for r in sent]
    squares = 0.0
    for k in range(3):
        for module in parts[k]:
            exact = 0.5 * sum(part[module] for i, part in enumerate(parts) if i != k) / 2
            squares += float((exact - best_of_rank(exact, 2)).square().sum())
    _, later = play(algorithm, federation, state, centres, 2)
    assert abs(later[0].payload.scalars["own_share"] - 0.5) > 0.01
    found = algorithm.combine(state, later).diagnostics.round["truncation"]
    assert found == pytest.approx(squares**0.5, rel=1e-4)


def test_a_share_is_the_only_number_that_travels_beside_the_parts() -> None:
    federation = context([6] * 3)
    algorithm = FedAlt(rest_space="factor", learned_share=True).for_federation(federation)
    state = started(algorithm, federation)
    half = 4 * sum(tensor.numel() for tensor in lora(3, 0).values())
    assert algorithm.instruct(state, "client-0").num_bytes == half + 8
    centres = {client: lora(6, 1) for client in names(3)}
    assert play(algorithm, federation, state, centres, 1)[1][0].payload.num_bytes == half + 8


def test_factors_of_different_or_odd_rank_and_settings_that_nothing_reads_are_refused() -> None:
    factors = FedAlt(rest_space="factor")
    with pytest.raises(ConfigError, match=r"fedalt: client 'client-0' has rank 4"):
        factors.for_federation(context([4, 6]))
    with pytest.raises(ConfigError, match=r"of rank 5, 2 directions are trained and 3 are left"):
        factors.for_federation(context([5, 5]))
    with pytest.raises(ConfigError, match=r"set adapter.rank to 4"):
        FedAlt(rest_space="factor", trained_rank=2).for_federation(context([6, 6]))
    with pytest.raises(
        ConfigError, match="rest_share = 0.3 is not read where learned_share = true"
    ):
        FedAlt(learned_share=True, rest_share=0.3)
    with pytest.raises(
        ConfigError, match="share_rate = 0.1 is not read where learned_share = fals"
    ):
        FedAlt(share_rate=0.1)
