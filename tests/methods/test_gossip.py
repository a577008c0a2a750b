"""MIRA without a server: nodes mix by themselves what a relay passes on, and end as MIRA does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedmira.adapters import Adapter, digest
from fedmira.config import ServerSettings
from fedmira.errors import ConfigError
from fedmira.graphs import FixedGraph, Graph, LearnedGraph
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods import Gossip, Method, MethodContext, Mira, ServerState, Trained
from fedmira.methods.parts.partly_sent import PartlySent
from lora_federation import context, dense, descend, lora, names, started

COUNT, RANK, STEPS, RATE = 4, 2, 3, 0.25
EDGES = [
    ("client-0", "client-1", 1.0),
    ("client-1", "client-2", 0.4),
    ("client-0", "client-2", 0.7),
]
"""client-3 has nobody."""
GRAPH = FixedGraph(Graph.from_edges("file", names(COUNT), EDGES))
SIZE = 4 * sum(tensor.numel() for tensor in lora(RANK, 0).values())


def federation(ranks: Sequence[int] = (RANK,) * COUNT) -> MethodContext:
    return context(ranks, [10, 60, 20, 30], GRAPH)


class Nodes:
    """Clients with quadratic losses that keep their memories, and a relay between them."""

    def __init__(
        self,
        method: Method,
        ranks: Sequence[int] = (RANK,) * COUNT,
        longer: Mapping[ClientId, float] | None = None,
        server: ServerSettings | None = None,
    ) -> None:
        self.context = replace(federation(ranks), server=server or ServerSettings())
        self.longer = longer or {}
        self.method = method.for_federation(self.context)
        self.state: ServerState = started(self.method, self.context)
        self.memories: dict[ClientId, Payload] = {}
        self.begun: dict[ClientId, Adapter] = {}
        self.passed: dict[ClientId, Payload] = {}

    def round(self, number: int, cohort: Sequence[ClientId] = names(COUNT)) -> list[Reply]:
        sent = []
        for client in cohort:
            payload, memory = self.method.instruct(self.state, client), self.memories.get(client)
            if isinstance(payload, PartlySent):  # what a node has already is not carried to it
                carried = {**payload.sent, "adapter": payload.tensors["adapter"]}
                payload = replace(payload, tensors=carried)
            begun = self.method.begin(payload, memory)
            centre = lora(self.context.ranks[client], 50 + names(COUNT).index(client))
            times = self.longer.get(client, 1.0)
            centre = {name: times * tensor for name, tensor in centre.items()}
            adapter = descend(begun, centre, STEPS, RATE)
            rows = self.context.rows[client]
            answer, kept = self.method.finish(payload, memory, Trained(adapter, rows, STEPS, RATE))
            if kept is not None:
                self.memories[client] = kept
            self.begun[client], self.passed[client] = begun.adapter, payload
            sent.append(Reply(client, number, rows, answer))
        self.combined = self.method.combine(self.state, sent)
        self.state = self.combined.state
        return sent

    def adapters(self) -> dict[ClientId, Adapter]:
        return {
            client: self.method.adapter_for(self.state, client) for client in self.context.clients
        }


def passed_on(payload: Payload) -> set[str]:
    return {name.removeprefix("from ") for name in payload.tensors if name.startswith("from ")}


@pytest.mark.parametrize("space", ["product", "factor"])
@pytest.mark.parametrize("coupling", [0.4, 1.0])
def test_with_everybody_in_every_round_it_is_the_servers_step_on_the_same_graph_to_the_bit(
    space: Any, coupling: float
) -> None:
    nodes = Nodes(Gossip(coupling=coupling, space=space))
    server = Nodes(Mira(coupling=coupling, space=space))
    for number in (1, 2, 3):
        before = {client: digest(adapter) for client, adapter in nodes.adapters().items()}
        nodes.round(number), server.round(number)
        assert {client: digest(adapter) for client, adapter in nodes.begun.items()} == before, (
            "a node begins with what was evaluated"
        )
        for client, adapter in server.adapters().items():
            assert digest(nodes.adapters()[client]) == digest(adapter)
        for client, figures in server.combined.diagnostics.clients.items():
            for name, value in figures.items():
                assert nodes.combined.diagnostics.clients[client][name] == pytest.approx(value)
        for name in ("server_step", "max_degree", "guarded"):
            figures = (each.combined.diagnostics.round[name] for each in (nodes, server))
            assert len(set(figures)) == 1
        assert (
            nodes.combined.diagnostics.expects_motion == server.combined.diagnostics.expects_motion
        )


@pytest.mark.parametrize("screen", [True, False])
def test_an_update_of_another_order_of_length_is_left_out_as_the_server_would(screen: bool) -> None:
    settings = ServerSettings(screen=screen)
    nodes, server = (
        Nodes(method, longer={"client-2": 40.0}, server=settings) for method in (Gossip(), Mira())
    )
    for number in (1, 2):
        nodes.round(number), server.round(number)
    for client, adapter in server.adapters().items():
        assert digest(nodes.adapters()[client]) == digest(adapter)
    pulls = nodes.combined.diagnostics.clients
    expected = server.combined.diagnostics.clients
    for client in names(COUNT):
        assert pulls[client]["pull"] == pytest.approx(expected[client]["pull"])
    assert (pulls["client-2"]["pull"] == 0) == screen


def test_ranks_may_differ_where_products_are_mixed() -> None:
    ranks = (2, 3, 4, 2)
    nodes, server = Nodes(Gossip(), ranks), Nodes(Mira(), ranks)
    for number in (1, 2):
        nodes.round(number), server.round(number)
    for client, adapter in server.adapters().items():
        assert digest(nodes.adapters()[client]) == digest(adapter)


def test_a_step_is_equation_8_by_hand() -> None:
    """gamma = 1 / 1.7, the largest degree being that of client-0, times 64 / (64 + n_k)."""
    nodes = Nodes(Gossip())
    sent = {reply.client_id: dense(reply.payload.tensors["adapter"]) for reply in nodes.round(1)}
    nodes.round(2)
    weights = {"client-0": {"client-1": 1.0, "client-2": 0.7}, "client-3": {}}
    for client, edges in weights.items():
        gamma = 64 / (64 + nodes.context.rows[client]) / 1.7
        begun = dense(nodes.begun[client])
        for module, own in sent[client].items():
            way = sum(
                (weight * (own - sent[other][module]) for other, weight in edges.items()),
                torch.zeros_like(own),
            )
            expected = own - gamma * way
            if edges:  # the node's rank holds the best part of it
                left, values, right = torch.linalg.svd(expected, full_matrices=False)
                expected = left[:, :RANK] * values[:RANK] @ right[:RANK]
            torch.testing.assert_close(begun[module], expected, rtol=1e-4, atol=1e-5)


def test_only_what_is_new_is_passed_on_and_older_adapters_come_from_the_nodes_own_memory() -> None:
    nodes = Nodes(Gossip())
    nodes.round(1)
    assert not any(passed_on(payload) for payload in nodes.passed.values())
    nodes.round(2, ("client-0", "client-1"))
    assert passed_on(nodes.passed["client-0"]) == {"client-1", "client-2"}
    assert passed_on(nodes.passed["client-1"]) == {"client-0", "client-2"}
    nodes.round(3, ("client-0",))
    assert passed_on(nodes.passed["client-0"]) == {"client-1"}, "client-2 sent nothing since"
    assert set(nodes.memories["client-0"].tensors) == {"from client-1", "from client-2"}
    assert nodes.method.totals(nodes.state) == {
        "edges": 3,
        "messages_passed_on": 5,
        "bytes_passed_on": 5 * SIZE,
        "bytes_per_edge": 5 * SIZE / 3,
    }
    payload = nodes.method.instruct(nodes.state, "client-0")
    assert isinstance(payload, PartlySent) and payload.sent == {}
    assert payload.num_bytes == 8 * len(payload.scalars)
    before = digest(nodes.adapters()["client-0"])
    nodes.round(4, ("client-0",))
    assert digest(nodes.begun["client-0"]) == before


def test_a_node_that_lost_its_memory_goes_on_without_says_so_and_is_sent_all_again() -> None:
    nodes = Nodes(Gossip())
    nodes.round(1)
    nodes.round(2)
    nodes.round(3, ("client-0",))
    del nodes.memories["client-0"]
    (reply,) = nodes.round(4, ("client-0",))
    assert reply.payload.scalars == {"missing": 2.0}
    assert nodes.combined.diagnostics.clients["client-0"]["missing"] == 2
    assert digest(nodes.begun["client-0"]) == digest(nodes.passed["client-0"].tensors["adapter"])
    (reply,) = nodes.round(5, ("client-0",))
    assert passed_on(nodes.passed["client-0"]) == {"client-1", "client-2"}
    assert reply.payload.scalars == {}


def test_a_share_that_is_missing_stays_with_the_node() -> None:
    """The row of P then still sums to one."""
    nodes = Nodes(Gossip(space="factor"))
    nodes.round(1)
    nodes.round(2)
    payload = nodes.method.instruct(nodes.state, "client-0")
    one = {name: part for name, part in payload.tensors.items() if name != "from client-2"}
    begun = nodes.method.begin(Payload(one, payload.scalars), None).adapter
    share = payload.scalars["step client-1"]
    for name, own in payload.tensors["adapter"].items():
        other = payload.tensors["from client-1"][name]
        torch.testing.assert_close(begun[name], (1 - share) * own + share * other)


def test_nobody_is_pulled_at_coupling_zero_nor_without_neighbours() -> None:
    still, nodes = Nodes(Gossip(coupling=0)), Nodes(Gossip())
    for each in (still, nodes):
        each.round(1)
        each.round(2)
    alone = digest(still.adapters()["client-0"])
    assert alone == digest(still.state.adapters["client-0"]) and not still.method.aligns
    assert still.method.totals(still.state)["bytes_passed_on"] == 0
    assert digest(nodes.adapters()["client-3"]) == digest(still.adapters()["client-3"])
    assert digest(nodes.adapters()["client-0"]) != alone


@pytest.mark.parametrize(
    ("graph", "told"),
    [
        (LearnedGraph(), "a learned graph needs a server .*graph.kind to 'category'"),
        (FixedGraph(Graph.from_edges("file", names(COUNT), [])), "4 clients has no edge"),
    ],
)
def test_a_graph_that_is_learned_or_empty_is_refused(graph: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Gossip().for_federation(replace(federation(), graph=graph))


def test_factors_of_different_rank_are_refused() -> None:
    with pytest.raises(ConfigError, match="client 'client-0' has rank 2 and client 'client-1'"):
        Gossip(space="factor").for_federation(federation((2, 3, 2, 2)))


def test_the_client_half_asks_for_no_federation() -> None:
    nodes, bare = Nodes(Gossip()), Gossip()
    nodes.round(1)
    payload = nodes.method.instruct(nodes.state, "client-1")
    found = bare.begin(payload, None).adapter
    assert digest(found) == digest(nodes.adapters()["client-1"])
    told: Mapping[str, float] = bare.finish(payload, None, Trained(found, 60, 1, 0.1))[0].scalars
    assert told == {}
