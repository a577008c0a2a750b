"""MIRA on graphs that are learned in other ways than from cosines.

Principal angles, and pFedGraph's weights.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedmira.adapters import (
    Adapter,
    column_spaces,
    cross_gram,
    scale,
)
from fedmira.config import Config
from fedmira.graphs import (
    CollaborationGraph,
    GraphSource,
    LearnedGraph,
    collaboration_weights,
)
from fedmira.methods import Method, MethodContext, Mira, ServerState
from lora_federation import ALPHA, SMALL, context, dense, lora, replies, started

WIDE = {"q_proj": (64, 12), "v_proj": (48, 12)}
MODULES = tuple(f"m.{name}" for name in SMALL)


def begun(
    graph: GraphSource, ranks: list[int], **chosen: object
) -> tuple[MethodContext, Method, ServerState]:
    federation = context(ranks, rows=[16 + 8 * k for k in range(len(ranks))], graph=graph)
    algorithm = Mira(**chosen).for_federation(federation)  # type: ignore[arg-type]
    return federation, algorithm, started(algorithm, federation)


def pointing(group: int, client: int) -> dict[str, Tensor]:
    """B spans the columns of its group in another basis and size for every client.

    A is the client's own.
    """
    own, shared = lora(3, 50 + client, WIDE), lora(3, 900 + group, WIDE)
    turn = torch.randn(3, 3, generator=torch.Generator().manual_seed(client))
    return {
        name: tensor if ".lora_A." in name else (client + 1) * shared[name] @ turn
        for name, tensor in own.items()
    }


@pytest.mark.parametrize("sketch", [0, 4096])
def test_principal_angles_relate_clients_whose_updates_share_nothing_but_their_column_space(
    sketch: int,
) -> None:
    graph = LearnedGraph(nearest=2, warmup_rounds=0, space="subspace", sketch=sketch)
    federation = context([3] * 8, graph=graph)
    algorithm = Mira().for_federation(federation)
    adapters = {client: pointing(k % 2, k) for k, client in enumerate(federation.clients)}
    combined = algorithm.combine(
        started(algorithm, federation, WIDE), replies(federation, adapters)
    )
    assert combined.diagnostics.graph is not None
    ends = combined.diagnostics.graph.pairs
    assert len(ends) >= 8
    assert bool(((ends[:, 0] - ends[:, 1]) % 2 == 0).all())


def test_a_client_that_points_where_nobody_else_does_has_no_edges() -> None:
    """Groups of four, four and one in orthogonal coordinates.

    Once a share of the mean is out, the one's cosines are negative.
    """
    federation = context([3] * 9, graph=LearnedGraph(warmup_rounds=0, space="subspace"))
    algorithm = Mira().for_federation(federation)
    adapters: dict[str, Adapter] = {
        client: lora(3, 50 + k, WIDE) for k, client in enumerate(federation.clients)
    }
    for k, adapter in enumerate(adapters.values()):
        for name in ("m.q_proj", "m.v_proj"):
            others = torch.ones(len(adapter[f"{name}.lora_B.weight"]), dtype=torch.bool)
            others[3 * (k // 4) : 3 * (k // 4) + 3] = False
            adapter[f"{name}.lora_B.weight"][others] = 0
    combined = algorithm.combine(
        started(algorithm, federation, WIDE), replies(federation, adapters)
    )
    assert combined.diagnostics.graph is not None
    degrees = combined.diagnostics.graph.degrees
    assert bool((degrees[:8] > 0).all())
    assert float(degrees[8]) == 0
    assert combined.state.adapters["client-8"] is adapters["client-8"]


def test_kept_inner_products_of_subspaces_equal_those_computed_at_once() -> None:
    """Rounds of two clients refresh only their rows; ranks differ."""
    ranks = [4, 2, 4, 3]
    federation, algorithm, state = begun(
        LearnedGraph(nearest=2, warmup_rounds=0, space="subspace"), ranks, coupling=0.7
    )
    for round_number, pair in enumerate([(0, 1), (2, 3), (1, 2)], start=1):
        adapters = {federation.clients[k]: lora(ranks[k], 20 * round_number + k) for k in pair}
        state = algorithm.combine(state, replies(federation, adapters, round_number)).state
    spaces = [column_spaces(state.adapters[client]) for client in federation.clients]
    expected = cross_gram(spaces, [1.0] * 4, spaces, [1.0] * 4)
    torch.testing.assert_close(state.numbers["subspace_gram"], expected, rtol=1e-9, atol=1e-9)
    full = [
        dense(state.adapters[client], scale(ALPHA, rank))
        for client, rank in zip(federation.clients, ranks, strict=True)
    ]
    products = torch.tensor(
        [[sum(float((a[m] * b[m]).sum()) for m in MODULES) for b in full] for a in full],
        dtype=torch.float64,
    )
    torch.testing.assert_close(state.numbers["product_gram"], products, rtol=1e-5, atol=1e-5)


def flat(adapters: dict[str, Adapter], federation: MethodContext) -> Tensor:
    return torch.stack(
        [
            torch.cat(
                [m.flatten() for m in dense(adapters[client], federation.scale(client)).values()]
            )
            for client in federation.clients
        ]
    )


def test_principal_angles_need_factors() -> None:
    with pytest.raises(
        ValueError, match=r"compares column spaces of B A, which adapter.kind = 'prompt' has not"
    ):
        Config.model_validate(
            {
                "adapter": {"kind": "prompt"},
                "algorithm": {"name": "fedavg"},
                "graph": {"measure": "principal-angles"},
            }
        )


def test_a_step_of_one_along_pfedgraph_is_its_aggregation_with_the_mean_of_both_directions() -> (
    None
):
    """Ranks of 10 and more hold any sum, so nothing is cut off.

    Updates become P W with P made of (x + x^T) / 2.
    """
    graph = CollaborationGraph(
        warmup_rounds=0, memory=0, rows=tuple(16.0 + 8 * k for k in range(4))
    )
    federation, algorithm, state = begun(graph, [12] * 4, server_step=1, size_scale=0)
    adapters: dict[str, Adapter] = {
        client: lora(12, 30 + k) for k, client in enumerate(federation.clients)
    }
    combined = algorithm.combine(state, replies(federation, adapters))
    before = flat(adapters, federation)
    unit = before / before.norm(dim=1, keepdim=True)
    rows = torch.tensor(graph.rows, dtype=torch.float64)
    chosen = collaboration_weights(unit @ unit.T, rows / rows.sum(), 0.8)
    mixed = ((chosen + chosen.T) / 2).fill_diagonal_(0)
    mixed += torch.diag(1 - mixed.sum(dim=1))
    assert bool((mixed > 0).all())
    assert combined.diagnostics.round["guarded"] == 0
    after = {client: combined.state.adapters[client] for client in federation.clients}
    torch.testing.assert_close(
        flat(after, federation), mixed @ before, rtol=1e-4, atol=1e-4 * float(before.abs().max())
    )


def test_coupling_keeps_its_meaning_on_pfedgraph() -> None:
    """kappa of the way for the client with the largest degree, times a factor for its rows.

    The factor is n_0 / (n_0 + n_k).
    """
    graph = CollaborationGraph(warmup_rounds=0, rows=tuple(16.0 + 8 * k for k in range(5)))
    federation, algorithm, state = begun(graph, [3] * 5, coupling=0.6, size_scale=32)
    adapters: dict[str, Adapter] = {
        client: lora(3, 30 + k) for k, client in enumerate(federation.clients)
    }
    combined = algorithm.combine(state, replies(federation, adapters))
    assert combined.diagnostics.graph is not None
    degrees = combined.diagnostics.graph.degrees
    for k, client in enumerate(federation.clients):
        expected = 0.6 * float(degrees[k] / degrees.max()) * 32 / (32 + federation.rows[client])
        assert combined.diagnostics.clients[client]["pull"] == pytest.approx(expected)


def test_shuffled_pfedgraph_remembers_the_true_graph() -> None:
    true, control = (CollaborationGraph(warmup_rounds=0, shuffle_seed=seed) for seed in (None, 3))
    outcomes = []
    for graph in (true, control):
        federation, algorithm, state = begun(graph, [3] * 5)
        adapters: dict[str, Adapter] = {
            client: lora(3, 30 + k) for k, client in enumerate(federation.clients)
        }
        outcomes.append(algorithm.combine(state, replies(federation, adapters)))
    graphs = [outcome.diagnostics.graph for outcome in outcomes]
    assert graphs[0] is not None and graphs[1] is not None
    assert [graph.kind for graph in graphs if graph] == ["pfedgraph", "pfedgraph-shuffled"]
    assert torch.equal(outcomes[0].state.numbers["graph"], outcomes[1].state.numbers["graph"])
    assert not torch.equal(graphs[0].edge_list, graphs[1].edge_list)
    assert torch.equal(graphs[0].edge_weights.sort().values, graphs[1].edge_weights.sort().values)
