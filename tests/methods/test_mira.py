"""MIRA's server step on adapters: equation 8 in both spaces, and all that must stay untouched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_federation
from fedmira.adapters import (
    Adapter,
    digest,
    distance,
    mix,
    modules,
    norm,
    product_norm,
    scale,
    subtract,
    weighted_sum,
)
from fedmira.config import ServerSettings
from fedmira.errors import ConfigError
from fedmira.graphs import (
    FixedGraph,
    Graph,
    GraphSource,
    LearnedGraph,
    category_graph,
    random_graph,
    shuffled,
    uniform_graph,
)
from fedmira.messages import Payload, Reply
from fedmira.methods import Combined, Method, MethodContext, Mira, ServerState

MODULES = {"q_proj": (14, 12), "v_proj": (10, 12)}
ALPHA = 16.0


def names(count: int) -> tuple[str, ...]:
    return tuple(f"client-{k}" for k in range(count))


def lora(rank: int, seed: int, fresh: bool = False) -> dict[str, Tensor]:
    """Random factors; a fresh adapter has B = 0."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, (out, into) in MODULES.items():
        adapter[f"m.{name}.lora_A.weight"] = torch.randn(rank, into, generator=generator)
        up = torch.randn(out, rank, generator=generator)
        adapter[f"m.{name}.lora_B.weight"] = torch.zeros(out, rank) if fresh else up
    return adapter


def context(
    graph: GraphSource, count: int, ranks: Sequence[int] | None = None, cohort: int | None = None
) -> MethodContext:
    clients = names(count)
    return MethodContext(
        clients=clients,
        rows=dict.fromkeys(clients, 64),
        ranks=dict(zip(clients, ranks or [4] * count, strict=True)),
        alpha=ALPHA,
        graph=graph,
        cohort=cohort or count,
    )


def laplacian(graph: Graph) -> Tensor:
    return torch.from_numpy(graph.laplacian.toarray())


def mira(federation: MethodContext, **chosen: Any) -> Method:
    return Mira(**{"size_scale": 0.0, **chosen}).for_federation(federation)


def start(algorithm: Method, federation: MethodContext) -> ServerState:
    return algorithm.initial_state(
        {client: lora(federation.ranks[client], 0, fresh=True) for client in federation.clients}
    )


def replies_of(
    adapters: Mapping[str, Adapter], round_number: int = 1, rows: int = 64
) -> list[Reply]:
    return [
        Reply(client, round_number, rows, Payload({"adapter": adapter}))
        for client, adapter in adapters.items()
    ]


def trained(
    federation: MethodContext, seed: int = 10, clients: Sequence[str] | None = None
) -> dict[str, dict[str, Tensor]]:
    everyone = federation.clients
    return {
        client: lora(federation.ranks[client], seed + everyone.index(client))
        for client in clients or everyone
    }


def one_round(
    federation: MethodContext, adapters: Mapping[str, Adapter], **chosen: Any
) -> Combined:
    algorithm = mira(federation, **chosen)
    return algorithm.combine(start(algorithm, federation), replies_of(adapters))


def dense(adapter: Adapter, factor: float) -> dict[str, Tensor]:
    return {
        name: factor * up.double() @ down.double() for name, (down, up) in modules(adapter).items()
    }


def test_factor_space_is_identity_minus_gamma_laplacian_tensor_by_tensor() -> None:
    graph = random_graph(names(6), 0)
    federation = context(FixedGraph(graph), 6)
    adapters = trained(federation)
    after = one_round(federation, adapters, server_step=0.1, space="factor").state.adapters
    for name in adapters["client-0"]:
        stacked = torch.stack([adapters[client][name].double() for client in federation.clients])
        expected = torch.einsum(
            "kl,lij->kij", torch.eye(6, dtype=torch.float64) - 0.1 * laplacian(graph), stacked
        )
        for k, client in enumerate(federation.clients):
            torch.testing.assert_close(
                after[client][name].double(), expected[k], rtol=1e-6, atol=1e-6
            )


def test_factor_space_conserves_the_mean() -> None:
    federation = context(FixedGraph(random_graph(names(5), 1)), 5)
    adapters = trained(federation)
    after = one_round(federation, adapters, coupling=0.8, space="factor").state.adapters
    mean = weighted_sum([adapters[client] for client in federation.clients], [0.2] * 5)
    assert distance(
        mean, weighted_sum([after[client] for client in federation.clients], [0.2] * 5)
    ) < 1e-6 * norm(mean)


def test_product_space_conserves_the_mean_update_when_the_rank_holds_it() -> None:
    """Ranks of 12 hold any 14 x 12 matrix, so nothing is cut off."""
    federation = context(FixedGraph(random_graph(names(4), 1)), 4, ranks=[12] * 4)
    adapters = trained(federation)
    after = one_round(federation, adapters, coupling=0.8).state.adapters
    for name in modules(adapters["client-0"]):
        before_sum = sum(dense(adapter, 1.0)[name] for adapter in adapters.values())
        after_sum = sum(dense(after[client], 1.0)[name] for client in federation.clients)
        torch.testing.assert_close(after_sum, before_sum, rtol=1e-4, atol=1e-4)


def test_two_clients_keep_one_minus_two_gamma_a_of_their_difference() -> None:
    graph = Graph.from_edges("file", names(2), [("client-0", "client-1", 0.5)])
    federation = context(FixedGraph(graph), 2)
    adapters = trained(federation)
    after = one_round(federation, adapters, server_step=0.6, space="factor").state.adapters
    left, right = adapters.values()
    expected = {name: 0.4 * tensor for name, tensor in subtract(left, right).items()}
    assert distance(subtract(after["client-0"], after["client-1"]), expected) < 1e-6 * norm(
        expected
    )


def test_product_space_with_ranks_4_8_16_equals_dense_mixing_cut_to_each_rank() -> None:
    ranks = [4, 8, 10]
    graph = random_graph(names(3), 4)
    federation = context(FixedGraph(graph), 3, ranks=ranks)
    adapters = trained(federation)
    combined = one_round(federation, adapters, coupling=0.9)
    matrix = torch.eye(3, dtype=torch.float64) - 0.9 / float(graph.degrees.max()) * laplacian(graph)
    full = [
        dense(adapters[client], scale(ALPHA, rank))
        for client, rank in zip(federation.clients, ranks, strict=True)
    ]
    for k, (client, rank) in enumerate(zip(federation.clients, ranks, strict=True)):
        after = combined.state.adapters[client]
        assert {tensor.shape for tensor in after.values()} == {
            tensor.shape for tensor in adapters[client].values()
        }
        for name, found in dense(after, scale(ALPHA, rank)).items():
            mixed = sum(float(matrix[k, j]) * full[j][name] for j in range(3))
            left, values, right = torch.linalg.svd(mixed, full_matrices=False)
            best = left[:, :rank] * values[:rank] @ right[:rank]
            torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-5 * float(best.abs().max()))


@pytest.mark.parametrize(
    "shapes",
    [{"q_proj": (80, 72), "v_proj": (96, 64)}, {"q_proj": (40, 56)}],
    ids=["by QR", "by a full matrix"],
)
def test_product_space_with_ranks_4_8_16_32_equals_dense_mixing_cut_to_each_rank(
    shapes: dict[str, tuple[int, int]],
) -> None:
    ranks = [4, 8, 16, 32]
    graph = random_graph(names(4), 4)
    federation = context(FixedGraph(graph), 4, ranks=ranks)
    adapters = {
        client: lora_federation.lora(rank, 10 + rank, shapes)
        for client, rank in federation.ranks.items()
    }
    algorithm = mira(federation, coupling=0.9, size_scale=32.0)
    begin = algorithm.initial_state(
        {client: lora_federation.start(rank, shapes) for client, rank in federation.ranks.items()}
    )
    after = algorithm.combine(begin, replies_of(adapters)).state.adapters
    matrix = torch.eye(4, dtype=torch.float64) - 0.9 / float(graph.degrees.max()) * 32 / (
        32 + 64
    ) * laplacian(graph)
    full = [
        dense(adapters[client], scale(ALPHA, rank)) for client, rank in federation.ranks.items()
    ]
    for k, (client, rank) in enumerate(federation.ranks.items()):
        for name, found in dense(after[client], scale(ALPHA, rank)).items():
            mixed = torch.stack([float(matrix[k, j]) * full[j][name] for j in range(4)]).sum(dim=0)
            best = lora_federation.best_of_rank(mixed, rank)
            torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-5 * float(best.abs().max()))


def test_product_and_factor_mixing_agree_when_all_a_are_equal() -> None:
    federation = context(FixedGraph(random_graph(names(4), 0)), 4)
    adapters = trained(federation)
    common = adapters["client-0"]
    adapters = {
        c: {n: common[n] if ".lora_A." in n else t for n, t in adapter.items()}
        for c, adapter in adapters.items()
    }
    product, factor = (
        one_round(federation, adapters, coupling=0.7, space=space).state.adapters
        for space in ("product", "factor")
    )
    for client in federation.clients:
        for name, matrix in dense(product[client], 1.0).items():
            torch.testing.assert_close(
                matrix, dense(factor[client], 1.0)[name], rtol=1e-4, atol=1e-4
            )


def test_product_mixing_does_not_depend_on_the_factorisation() -> None:
    federation = context(FixedGraph(random_graph(names(4), 0)), 4)
    adapters = trained(federation)
    turn = torch.eye(4, dtype=torch.float64) + 0.4 * torch.randn(
        4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).tril(-1)
    turned = dict(adapters)
    turned["client-2"] = {
        name: (
            torch.linalg.solve(turn, tensor.double())
            if ".lora_A." in name
            else tensor.double() @ turn
        ).float()
        for name, tensor in adapters["client-2"].items()
    }
    first, second = (
        one_round(federation, each, coupling=0.9).state.adapters for each in (adapters, turned)
    )
    for client in federation.clients:
        for name, matrix in dense(first[client], 1.0).items():
            torch.testing.assert_close(
                dense(second[client], 1.0)[name], matrix, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("space", ["factor", "product"])
def test_weights_of_one_over_k_and_step_one_are_the_mean(space: str) -> None:
    federation = context(
        FixedGraph(Graph.from_matrix("file", names(4), uniform_graph(names(4)).matrix() / 4)),
        4,
        ranks=[12] * 4,
    )
    adapters = trained(federation)
    after = one_round(federation, adapters, server_step=1.0, space=space).state.adapters
    everyone = list(adapters.values())
    if space == "factor":
        expected = dense(weighted_sum(everyone, [0.25] * 4), 1.0)
    else:
        expected = dense(mix(everyone, [0.25] * 4, [1.0] * 4, 12, 1.0, everyone[0]).adapter, 1.0)
    for client in federation.clients:
        for name, matrix in dense(after[client], 1.0).items():
            torch.testing.assert_close(matrix, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("space", ["factor", "product"])
@pytest.mark.parametrize("off", [{"coupling": 0.0}, {"server_step": 0.0}])
def test_no_coupling_is_local_training_bit_for_bit(space: str, off: dict[str, float]) -> None:
    federation = context(FixedGraph(uniform_graph(names(4))), 4)
    adapters = trained(federation)
    combined = one_round(federation, adapters, space=space, **off)
    for client in federation.clients:
        assert combined.state.adapters[client] is adapters[client]
        assert combined.diagnostics.clients[client]["pull"] == 0
    assert combined.diagnostics.expects_motion == frozenset()
    assert (
        combined.diagnostics.round["disagreement_before"]
        == combined.diagnostics.round["disagreement_after"]
    )


def test_disagreement_is_that_of_the_adapters_before_and_after_and_the_given_state_stays() -> None:
    """In factor space trace(L W W^T), W the flattened adapters before and after the pull."""
    federation = context(FixedGraph(uniform_graph(names(4))), 4)
    algorithm = mira(federation, space="factor")

    def disagreement(adapters: Mapping[str, Mapping[str, Tensor]]) -> float:
        flat = torch.stack(
            [
                torch.cat([tensor.double().flatten() for _, tensor in sorted(adapters[k].items())])
                for k in federation.clients
            ]
        )
        return float((laplacian(uniform_graph(names(4))) @ flat @ flat.T).trace())

    state = start(algorithm, federation)
    for number in (1, 2):
        adapters = {client: lora(4, 10 * number + k) for k, client in enumerate(federation.clients)}
        held = {name: tensor.clone() for name, tensor in state.numbers.items()}
        combined = algorithm.combine(state, replies_of(adapters, round_number=number))
        assert all(torch.equal(state.numbers[name], tensor) for name, tensor in held.items())
        found = combined.diagnostics.round
        after = {client: combined.state.adapters[client] for client in federation.clients}
        assert found["disagreement_before"] == pytest.approx(disagreement(adapters), rel=1e-6)
        assert found["disagreement_after"] == pytest.approx(disagreement(after), rel=1e-6)
        assert found["disagreement_after"] < found["disagreement_before"]
        state = combined.state


@pytest.mark.parametrize("space", ["factor", "product"])
def test_clients_outside_the_round_are_unchanged_and_still_pull_when_stale(space: str) -> None:
    federation = context(FixedGraph(uniform_graph(names(4))), 4)
    algorithm = mira(federation, coupling=0.5, space=space)
    first = algorithm.combine(
        start(algorithm, federation),
        replies_of(trained(federation, clients=["client-0", "client-1"])),
    ).state
    second = algorithm.combine(
        first, replies_of(trained(federation, seed=50, clients=["client-2"]), round_number=2)
    )
    for client in ("client-0", "client-1", "client-3"):
        assert second.state.adapters[client] is first.adapters[client]
    assert second.state.numbers["last_round"].tolist() == [1, 1, 2, 0]
    assert second.diagnostics.clients["client-2"]["pull"] == pytest.approx(0.5 * 2 / 3)
    assert second.diagnostics.expects_motion == {"client-2"}


def test_fresh_neighbours_are_those_of_the_round() -> None:
    federation = context(FixedGraph(uniform_graph(names(4))), 4)
    algorithm = mira(federation, coupling=0.5, neighbours="fresh", space="factor")
    first = algorithm.combine(start(algorithm, federation), replies_of(trained(federation))).state
    adapters = trained(federation, seed=50, clients=["client-1", "client-2"])
    after = algorithm.combine(first, replies_of(adapters, round_number=2)).state.adapters
    expected = weighted_sum([adapters["client-1"], adapters["client-2"]], [1 - 0.5 / 3, 0.5 / 3])
    assert distance(after["client-1"], expected) < 1e-6


@pytest.mark.parametrize("space", ["factor", "product"])
@pytest.mark.parametrize("learned", [False, True])
def test_permuting_the_clients_permutes_the_result(space: str, learned: bool) -> None:
    """An update in place, one client after another, would fail this."""
    graph = random_graph(names(6), 2)
    federation = context(
        LearnedGraph(warmup_rounds=0, nearest=2) if learned else FixedGraph(graph), 6
    )
    backwards = replace(federation, clients=federation.clients[::-1])
    adapters = trained(federation)
    first, second = (
        one_round(each, adapters, coupling=0.8, space=space).state.adapters
        for each in (federation, backwards)
    )
    for client in federation.clients:
        for name, matrix in dense(first[client], 1.0).items():
            torch.testing.assert_close(
                dense(second[client], 1.0)[name], matrix, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("space", ["factor", "product"])
def test_order_of_replies_does_not_matter_to_the_last_bit(space: str) -> None:
    federation = context(LearnedGraph(warmup_rounds=0), 5)
    algorithm = mira(federation, space=space)
    replies = replies_of(trained(federation))
    first, second = (
        algorithm.combine(start(algorithm, federation), each) for each in (replies, replies[::-1])
    )
    for client in federation.clients:
        assert digest(first.state.adapters[client]) == digest(second.state.adapters[client])


@pytest.mark.parametrize("space", ["factor", "product"])
def test_alignment_changes_what_clients_train_from_in_the_next_round(space: str) -> None:
    federation = context(FixedGraph(uniform_graph(names(3))), 3)
    sent = []
    for coupling in (0.0, 0.3):
        algorithm = mira(federation, coupling=coupling, space=space)
        state = algorithm.combine(
            start(algorithm, federation), replies_of(trained(federation))
        ).state
        sent.append(algorithm.begin(algorithm.instruct(state, "client-1"), None).adapter)
    assert distance(*sent) > 0.01 * norm(sent[0])


def test_fixed_point_of_quadratic_clients_is_the_linear_solution() -> None:
    """f_k = 1/2 (w - c)^T H (w - c), R gradient steps of size mu, then P.

    W = P (G w + (I - G) c) with G = (I - mu H)^R.
    """
    count, size, step, repeats = 4, 2, 0.2, 3
    generator = torch.Generator().manual_seed(3)
    graph = random_graph(names(count), 1)
    federation = context(FixedGraph(graph), count, ranks=[1] * count)
    algorithm = mira(federation, server_step=0.3, space="factor")
    roots = torch.randn(count, 2 * size, 2 * size, generator=generator, dtype=torch.float64)
    curvature = roots @ roots.mT / (2 * size) + 0.5 * torch.eye(2 * size, dtype=torch.float64)
    centres = torch.randn(count, 2 * size, generator=generator, dtype=torch.float64)

    def adapter(flat: Tensor) -> dict[str, Tensor]:
        return {
            "m.lora_A.weight": flat[:size].view(1, size).float(),
            "m.lora_B.weight": flat[size:].view(size, 1).float(),
        }

    def train(k: int, start_from: Adapter) -> Adapter:
        flat = torch.cat([tensor.flatten() for tensor in start_from.values()]).double()
        for _ in range(repeats):
            flat = flat - step * curvature[k] @ (flat - centres[k])
        return adapter(flat)

    state = algorithm.initial_state(
        {
            client: adapter(torch.zeros(2 * size, dtype=torch.float64))
            for client in federation.clients
        }
    )
    for round_number in range(1, 80):
        results = {
            client: train(k, state.adapters[client]) for k, client in enumerate(federation.clients)
        }
        state = algorithm.combine(state, replies_of(results, round_number)).state
    found = torch.stack(
        [
            torch.cat([tensor.flatten() for tensor in state.adapters[client].values()])
            for client in federation.clients
        ]
    )

    eye = torch.eye(2 * size, dtype=torch.float64)
    left_over = torch.block_diag(
        *[torch.linalg.matrix_power(eye - step * curvature[k], repeats) for k in range(count)]
    )
    mixing = torch.kron(torch.eye(count, dtype=torch.float64) - 0.3 * laplacian(graph), eye)
    everything = torch.eye(count * 2 * size, dtype=torch.float64)
    expected = torch.linalg.solve(
        everything - mixing @ left_over, mixing @ (everything - left_over) @ centres.flatten()
    )
    torch.testing.assert_close(found.double().flatten(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("space", ["factor", "product"])
def test_a_client_without_edges_keeps_its_trained_adapter(space: str) -> None:
    clients = names(4)
    federation = context(
        FixedGraph(category_graph(clients, dict(zip(clients, "xxxy", strict=True)))), 4
    )
    adapters = trained(federation)
    combined = one_round(federation, adapters, space=space)
    assert combined.state.adapters["client-3"] is adapters["client-3"]
    assert combined.diagnostics.clients["client-3"]["degree"] == 0
    assert combined.diagnostics.expects_motion == {"client-0", "client-1", "client-2"}


def test_clients_that_agree_are_not_expected_to_move() -> None:
    federation = context(FixedGraph(uniform_graph(names(3))), 3)
    same = lora(4, 7)
    combined = one_round(federation, dict.fromkeys(federation.clients, same), coupling=0.5)
    assert combined.diagnostics.expects_motion == frozenset()
    assert combined.diagnostics.round["disagreement_before"] == pytest.approx(0, abs=1e-6)


def grouped(federation: MethodContext) -> dict[str, dict[str, Tensor]]:
    """Even and odd clients learn two different updates, each with a little noise of its own.

    A is the common start.
    """
    common = lora(4, 0)
    kinds = [lora(4, 100), lora(4, 200)]
    adapters = {}
    for k, client in enumerate(federation.clients):
        noise = lora(4, 300 + k)
        adapters[client] = {
            name: tensor if ".lora_A." in name else kinds[k % 2][name] + 0.2 * noise[name]
            for name, tensor in common.items()
        }
    return adapters


def test_learned_graph_finds_planted_groups_and_first_only_learns() -> None:
    federation = context(LearnedGraph(nearest=3, warmup_rounds=1), 8)
    algorithm = mira(federation, coupling=1.0)
    adapters = grouped(federation)
    warm = algorithm.combine(start(algorithm, federation), replies_of(adapters))
    assert warm.diagnostics.graph is None
    assert warm.diagnostics.round["server_step"] == 0
    assert all(warm.state.adapters[client] is adapters[client] for client in federation.clients)
    assert len(warm.state.numbers["graph"]) > 0

    acting = algorithm.combine(warm.state, replies_of(adapters, round_number=2))
    assert acting.diagnostics.graph is not None
    edges = acting.diagnostics.graph.edges()
    assert all(
        (federation.clients.index(one) - federation.clients.index(other)) % 2 == 0
        for one, other, _ in edges
    )
    assert acting.diagnostics.expects_motion == set(federation.clients)
    assert (
        acting.diagnostics.round["disagreement_after"]
        < acting.diagnostics.round["disagreement_before"]
    )


@pytest.mark.parametrize("learned", [False, True])
def test_shuffled_control_mixes_strangers_and_remembers_the_true_graph(learned: bool) -> None:
    clients = names(8)
    categories = dict(zip(clients, "xyxyxyxy", strict=True))
    true_graph = category_graph(clients, categories)
    sources: tuple[GraphSource, GraphSource] = (
        (LearnedGraph(warmup_rounds=0), LearnedGraph(warmup_rounds=0, shuffle_seed=1))
        if learned
        else (FixedGraph(true_graph), FixedGraph(shuffled(true_graph, 1)))
    )
    federations = [context(source, 8) for source in sources]
    adapters = grouped(federations[0])
    true, control = (one_round(federation, adapters) for federation in federations)
    distances = [
        distance(true.state.adapters[client], control.state.adapters[client]) for client in clients
    ]
    assert max(distances) > 0.1 * norm(adapters["client-0"])
    assert (
        control.diagnostics.round["disagreement_before"]
        > 5 * true.diagnostics.round["disagreement_before"]
    )
    if learned:
        assert torch.equal(true.state.numbers["graph"], control.state.numbers["graph"])


def test_learned_graph_leaves_out_clients_that_never_trained() -> None:
    federation = context(LearnedGraph(warmup_rounds=0), 6, cohort=4)
    adapters = {
        client: adapter for client, adapter in grouped(federation).items() if client in names(6)[:4]
    }
    combined = one_round(federation, adapters)
    assert len(combined.state.numbers["graph"]) > 0
    assert float(combined.state.numbers["graph"][:, :2].max()) < 4


@pytest.mark.parametrize("space", ["factor", "product"])
def test_kept_inner_products_equal_those_computed_at_once(space: str) -> None:
    """Rounds of two clients refresh only their rows.

    In the end the matrix is that of all stored adapters.
    """
    federation = context(LearnedGraph(warmup_rounds=0, nearest=2), 6)
    algorithm = mira(federation, coupling=0.7, space=space)
    state = start(algorithm, federation)
    for round_number, pair in enumerate([(0, 1), (2, 3), (4, 5), (1, 4)], start=1):
        adapters = trained(
            federation, seed=20 * round_number, clients=[federation.clients[k] for k in pair]
        )
        state = algorithm.combine(state, replies_of(adapters, round_number)).state
    factor = scale(ALPHA, 4)
    flat = torch.stack(
        [
            torch.cat([m.flatten() for m in dense(state.adapters[c], factor).values()])
            for c in federation.clients
        ]
    )
    if space == "product":
        torch.testing.assert_close(
            state.numbers["product_gram"], flat @ flat.T, rtol=1e-9, atol=1e-8
        )
    else:
        whole = torch.stack(
            [
                torch.cat([t.flatten() for t in state.adapters[c].values()])
                for c in federation.clients
            ]
        ).double()
        torch.testing.assert_close(
            state.numbers["factor_gram"], whole @ whole.T, rtol=1e-9, atol=1e-8
        )


@pytest.mark.parametrize("space", ["factor", "product"])
def test_disagreement_is_half_the_weighted_sum_of_squared_distances(space: str) -> None:
    graph = random_graph(names(4), 0)
    federation = context(FixedGraph(graph), 4)
    adapters = trained(federation)
    combined = one_round(federation, adapters, coupling=0.5, space=space)

    def half_sum(states: Mapping[str, Adapter]) -> float:
        total = 0.0
        for one, other, weight in graph.edges():
            if space == "factor":
                total += weight * distance(states[one], states[other]) ** 2
            else:
                left, right = (
                    dense(states[one], scale(ALPHA, 4)),
                    dense(states[other], scale(ALPHA, 4)),
                )
                total += weight * sum(
                    float((left[name] - right[name]).square().sum()) for name in left
                )
        return total

    assert combined.diagnostics.round["disagreement_before"] == pytest.approx(
        half_sum(adapters), rel=1e-6
    )
    assert combined.diagnostics.round["disagreement_after"] == pytest.approx(
        half_sum(combined.state.adapters), rel=1e-6
    )


def test_relative_pull_is_what_moved_over_the_update() -> None:
    federation = context(FixedGraph(uniform_graph(names(3))), 3)
    adapters = trained(federation)
    combined = one_round(federation, adapters, coupling=0.5)
    for client in federation.clients:
        before, after = (dense(each[client], 1.0) for each in (adapters, combined.state.adapters))
        moved = sum(float((after[name] - before[name]).square().sum()) for name in before) ** 0.5
        update = sum(float(matrix.square().sum()) for matrix in before.values()) ** 0.5
        assert combined.diagnostics.clients[client]["relative_pull"] == pytest.approx(
            moved / update, rel=1e-6
        )
        assert combined.diagnostics.clients[client]["pull"] == pytest.approx(0.5)
        assert 0 < combined.diagnostics.clients[client]["truncation"] < 1


def test_a_client_that_learned_nothing_is_moved_by_one_whole_update_among_who_trust_it() -> None:
    federation = replace(
        context(FixedGraph(uniform_graph(names(3))), 3), server=ServerSettings(screen=False)
    )
    combined = one_round(
        federation, {**trained(federation), "client-0": lora(4, 0, fresh=True)}, coupling=0.5
    )
    assert combined.diagnostics.clients["client-0"]["relative_pull"] == 1
    assert "client-0" in combined.diagnostics.expects_motion


def weakened(adapter: Adapter, share: float) -> Adapter:
    """The same direction with a share of its length."""
    return {
        name: tensor * share if name.endswith("lora_B.weight") else tensor
        for name, tensor in adapter.items()
    }


@pytest.mark.parametrize("graph", ["learned", "uniform"])
@pytest.mark.parametrize("space", ["factor", "product"])
@pytest.mark.parametrize("share", [1e-4, 0.0])
def test_who_sends_next_to_nothing_is_handed_nobody_elses_adapter(
    space: str, share: float, graph: str
) -> None:
    source = (
        LearnedGraph(warmup_rounds=0) if graph == "learned" else FixedGraph(uniform_graph(names(2)))
    )
    federation = context(source, 2)
    honest = lora(4, 1)
    sent = {"client-0": honest, "client-1": weakened(honest, share)}
    combined = one_round(federation, sent, coupling=1.0, space=space)
    assert combined.diagnostics.clients["client-1"]["pull"] == 0
    for client, adapter in sent.items():  # nobody is moved, and nobody loses what it learned
        assert digest(combined.state.adapters[client]) == digest(adapter)
    trusting = replace(federation, server=ServerSettings(screen=False))
    handed = one_round(trusting, sent, coupling=1.0, space=space)
    if graph == "uniform" or share:
        assert product_norm(handed.state.adapters["client-1"]) > 0.4 * product_norm(honest)


def test_with_two_clients_and_a_least_number_of_two_nobody_is_moved() -> None:
    federation = replace(
        context(FixedGraph(uniform_graph(names(2))), 2), server=ServerSettings(least_mixed=2)
    )
    combined = one_round(federation, trained(federation), coupling=1.0)
    assert [figures["pull"] for figures in combined.diagnostics.clients.values()] == [0, 0]


@pytest.mark.parametrize("space", ["factor", "product"])
def test_mixing_with_equal_neighbours_counts_as_no_motion(space: str) -> None:
    """The product is factored anew, which changes bits and rounding but not the update."""
    federation = context(FixedGraph(uniform_graph(names(3))), 3)
    combined = one_round(
        federation, dict.fromkeys(federation.clients, lora(4, 7)), coupling=0.5, space=space
    )
    assert [
        combined.diagnostics.clients[client]["relative_pull"] for client in federation.clients
    ] == pytest.approx([0, 0, 0], abs=1e-6)


def test_rows_of_the_reply_set_the_size_aware_step() -> None:
    federation = context(FixedGraph(uniform_graph(names(3))), 3)
    algorithm = mira(federation, coupling=1.0, size_scale=64.0)
    replies = [
        replace(reply, num_examples=rows)
        for reply, rows in zip(replies_of(trained(federation)), (16, 64, 192), strict=True)
    ]
    combined = algorithm.combine(start(algorithm, federation), replies)
    assert [
        combined.diagnostics.clients[client]["pull"] for client in federation.clients
    ] == pytest.approx([0.8, 0.5, 0.25])


def test_guard_is_reported() -> None:
    federation = context(FixedGraph(uniform_graph(names(3))), 3)
    combined = one_round(federation, trained(federation), server_step=2.0)
    assert combined.diagnostics.round["guarded"] == 1
    assert combined.diagnostics.round["server_step"] == pytest.approx(0.5)
    assert combined.diagnostics.round["max_degree"] == 2


def test_first_updates_of_zero_do_not_break_anything() -> None:
    """Nobody moved from B = 0: the mixture is zero, A stays, and there is no NaN."""
    federation = context(LearnedGraph(warmup_rounds=0), 4)
    idle = dict.fromkeys(federation.clients, lora(4, 0, fresh=True))
    combined = one_round(federation, idle)
    assert len(combined.state.numbers["graph"]) == 0
    uniform = context(FixedGraph(uniform_graph(names(4))), 4)
    mixed = one_round(uniform, idle)
    assert all(
        digest(mixed.state.adapters[client]) == digest(idle[client]) for client in uniform.clients
    )
    assert mixed.diagnostics.expects_motion == frozenset()
    assert mixed.diagnostics.clients["client-0"]["relative_pull"] == 0


@pytest.mark.parametrize("policy", ["fresh", "rescaled"])
def test_one_client_a_round_needs_stale_neighbours(policy: str) -> None:
    federation = context(FixedGraph(uniform_graph(names(4))), 4, cohort=1)
    with pytest.raises(ConfigError, match=r"algorithm\.neighbours = .*set it to 'stale'"):
        mira(federation, neighbours=policy)
    mira(federation, neighbours="stale")
    mira(federation, neighbours=policy, coupling=0.0)


def test_factors_of_different_ranks_cannot_be_mixed() -> None:
    federation = context(FixedGraph(uniform_graph(names(3))), 3, ranks=[4, 4, 8])
    with pytest.raises(
        ConfigError,
        match=r"'client-0' has rank 4 and client 'client-2' rank 8.*algorithm\.space to 'product'",
    ):
        mira(federation, space="factor")


@pytest.mark.parametrize(
    ("source", "count", "part"),
    [
        (
            FixedGraph(category_graph(names(3), dict(zip(names(3), "xyz", strict=True)))),
            3,
            "has no edge",
        ),
        (LearnedGraph(), 1, "graph of 1 client has no edge"),
    ],
)
def test_a_graph_that_can_never_act_is_refused_while_coupling_is_on(
    source: GraphSource, count: int, part: str
) -> None:
    with pytest.raises(ConfigError, match=part):
        mira(context(source, count))
    mira(context(source, count), coupling=0.0)


def test_alignment_is_on_when_coupling_or_server_step_is_above_zero() -> None:
    federation = context(FixedGraph(uniform_graph(names(3))), 3)
    assert mira(federation).aligns
    assert mira(federation, server_step=0.1).aligns
    assert not mira(federation, coupling=0.0).aligns
    assert not mira(federation, server_step=0.0).aligns
