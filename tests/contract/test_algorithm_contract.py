"""What every algorithm of the table must keep.

Purity, order, absence, and a state that is the whole checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from fedmira.adapters import Adapter, digest, same_shapes
from fedmira.adapters.directions import movement
from fedmira.config import LocalSettings
from fedmira.config.methods import METHODS, MethodSection
from fedmira.graphs import (
    BlocksGraph,
    CollaborationGraph,
    FixedGraph,
    Graph,
    GraphSource,
    LearnedGraph,
    random_graph,
)
from fedmira.messages import Failure, Payload, Reply, Request
from fedmira.methods import (
    CgcLora,
    Ditto,
    FedAlt,
    FedAvg,
    FedDpa,
    FedEx,
    FedFomo,
    FedItFinetune,
    FedKSeed,
    FedLease,
    FedOpt,
    FedProx,
    FedRot,
    FlexLora,
    Flora,
    Fola,
    Gossip,
    HetLora,
    Local,
    LoraFair,
    Method,
    MethodContext,
    Mira,
    MtLora,
    RoLora,
    Scaffold,
    ServerState,
    ShareFactor,
    Trained,
    TwoLevel,
)
from fedmira.model import (
    BaseModel,
    LocalTask,
    find_targets,
    train_cohort,
)
from fedmira.model import start_adapter as drawn_start
from fedmira.rounds.complete import complete
from tiny import draw_rows

CLIENTS = tuple(f"client-{k}" for k in range(6))
FIXED = FixedGraph(random_graph(CLIENTS, 0))
LEARNED = LearnedGraph(nearest=2, warmup_rounds=0)
SETTINGS: dict[str, tuple[MethodSection, GraphSource]] = {
    "local": (Local(), FIXED),
    "fedavg": (FedAvg(), FIXED),
    "fedit-finetune": (FedItFinetune(), FIXED),
    "fedit-finetune from round 2": (
        FedItFinetune(finetune_share=0.9),
        FIXED,
    ),
    "fedprox": (FedProx(), FIXED),
    "ditto": (Ditto(), FIXED),
    "share-factor, A": (ShareFactor(), FIXED),
    "share-factor, B": (ShareFactor(shared_factor="B"), FIXED),
    "share-factor, A frozen": (
        ShareFactor(shared_factor="B", private_factor="frozen"),
        FIXED,
    ),
    "flexlora": (FlexLora(), FIXED),
    "hetlora": (HetLora(), FIXED),
    "fedex": (FedEx(), FIXED),
    "flora": (Flora(), FIXED),
    "flora, one direction frozen": (Flora(frozen_rank=1), FIXED),
    "fedrot": (FedRot(), FIXED),
    "fedrot, in turns": (FedRot(aligned_by="turns"), FIXED),
    "fedopt": (FedOpt(), FIXED),
    "fedopt, momentum": (FedOpt(server_optimizer="momentum"), FIXED),
    "fedopt, yogi": (FedOpt(server_optimizer="yogi"), FIXED),
    "fedopt, adagrad": (FedOpt(server_optimizer="adagrad"), FIXED),
    "scaffold": (Scaffold(), FIXED),
    "fedlease": (FedLease(), FIXED),
    "fedlease, never apart": (FedLease(most_clusters=1), FIXED),
    "fedlease, later": (FedLease(warmup_share=0.7), FIXED),
    "fedalt": (FedAlt(), FIXED),
    "fedalt, learned graph": (FedAlt(trained_rank=3), LEARNED),
    "fedalt, sketched": (
        FedAlt(),
        LearnedGraph(nearest=2, warmup_rounds=0, sketch=32),
    ),
    "fedalt, factors": (FedAlt(rest_space="factor"), FIXED),
    "fedalt, learned share": (FedAlt(learned_share=True), LEARNED),
    "fedalt, factors and learned share": (
        FedAlt(rest_space="factor", learned_share=True),
        FIXED,
    ),
    "feddpa": (FedDpa(), FIXED),
    "feddpa, together": (FedDpa(halves="together", global_rank=3), FIXED),
    "cgc-lora": (CgcLora(common_experts=2), FIXED),
    "cgc-lora, one common expert": (CgcLora(common_experts=1, experts_rank=3), FIXED),
    "cgc-lora, none": (CgcLora(common_experts=0), FIXED),
    "fola": (Fola(), FIXED),
    "fola, neither prior nor damping": (Fola(prior=0, damping=0), FIXED),
    "mtlora": (MtLora(), FIXED),
    "mtlora, all shared": (MtLora(shared_rank=4), FIXED),
    "mtlora, nothing shared": (MtLora(shared_rank=0), FIXED),
    "mtlora, own parts aligned": (MtLora(own_coupling=1.0), LEARNED),
    "lora-fair": (LoraFair(), FIXED),
    "rolora": (RoLora(), FIXED),
    "fedfomo": (FedFomo(candidates=2), FIXED),
    "fedkseed": (FedKSeed(), FIXED),
    "gossip": (Gossip(), FIXED),
    "gossip, factor space": (Gossip(space="factor", size_scale=0), FIXED),
    "mira": (Mira(), LEARNED),
    "two-level": (TwoLevel(), LEARNED),
    "two-level, fixed graph": (TwoLevel(), FIXED),
    "two-level, sketched": (
        TwoLevel(),
        LearnedGraph(nearest=2, warmup_rounds=0, sketch=32),
    ),
    "two-level, principal angles": (
        TwoLevel(),
        LearnedGraph(nearest=2, warmup_rounds=0, space="subspace"),
    ),
    "two-level, pfedgraph": (TwoLevel(), CollaborationGraph(warmup_rounds=0)),
    "two-level, nothing common": (TwoLevel(common_rank=0), LEARNED),
    "two-level, nobody aligned": (TwoLevel(coupling=0), LEARNED),
    "two-level, neither": (TwoLevel(coupling=0, common_rank=0), LEARNED),
    "two-level, safeguarded": (TwoLevel(safeguard=True), LEARNED),
    "mira, fixed graph": (Mira(), FIXED),
    "mira, factor space": (Mira(space="factor", neighbours="rescaled"), LEARNED),
    "mira, as published": (
        Mira(space="factor", neighbours="fresh", server_step=0.01, size_scale=0),
        FIXED,
    ),
    "mira, safeguarded": (Mira(safeguard=True), FIXED),
    "mira, safeguarded factors": (Mira(safeguard=True, space="factor"), LEARNED),
    "mira, shuffled": (Mira(), LearnedGraph(warmup_rounds=0, shuffle_seed=3)),
    "mira, sketched": (Mira(), LearnedGraph(nearest=2, warmup_rounds=0, sketch=32)),
    "mira, principal angles": (
        Mira(),
        LearnedGraph(nearest=2, warmup_rounds=0, space="subspace"),
    ),
    "mira, sketched principal angles": (
        Mira(),
        LearnedGraph(nearest=2, warmup_rounds=0, space="subspace", sketch=32),
    ),
    "mira, blocks": (Mira(), BlocksGraph(nearest=2, warmup_rounds=0, strength=0.2)),
    "mira, pfedgraph": (
        Mira(server_step=1, size_scale=0),
        CollaborationGraph(warmup_rounds=0),
    ),
    "fedalt, pfedgraph": (
        FedAlt(),
        CollaborationGraph(warmup_rounds=0, space="subspace", shuffle_seed=1),
    ),
    "mira, sketched factors": (
        Mira(space="factor"),
        LearnedGraph(nearest=2, warmup_rounds=0, sketch=32),
    ),
}


def lora(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "m.q.lora_A.weight": (4, 12),
        "m.q.lora_B.weight": (10, 4),
        "m.v.lora_A.weight": (4, 12),
        "m.v.lora_B.weight": (6, 4),
    }
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def start_adapter() -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(tensor) if ".lora_B." in name else tensor
        for name, tensor in lora(0).items()
    }


FREEZING = (
    "share-factor, A frozen",
    "fedex",
    "flora",
    "flora, one direction frozen",
    "fedalt",
    "fedalt, learned graph",
    "fedalt, sketched",
    "fedalt, pfedgraph",
    "fedalt, factors",
    "fedalt, learned share",
    "fedalt, factors and learned share",
    "feddpa",
    "rolora",
)
"""Those that freeze a part of the adapter."""


@pytest.fixture(params=SETTINGS)
def algorithm(request: pytest.FixtureRequest) -> Method:
    return built(request.param)


def built(name: str) -> Method:
    settings, graph = SETTINGS[name]
    context = MethodContext(
        CLIENTS,
        dict.fromkeys(CLIENTS, 20),
        dict.fromkeys(CLIENTS, 4),
        16.0,
        graph,
        cohort=4,
        rounds=3,
    )
    return settings.for_federation(context)


def begin_state(algorithm: Method) -> ServerState:
    return algorithm.initial_state({client: start_adapter() for client in CLIENTS})


def replies(
    algorithm: Method, state: ServerState, clients: Sequence[str], round_number: int
) -> list[Reply]:
    """Both client halves around a local training that adds fixed numbers.

    Each client and round has its own.
    """
    result = []
    for client in clients:
        payload = algorithm.instruct(state, client)
        begun = algorithm.begin(payload, None).adapter
        change = lora(1000 * round_number + CLIENTS.index(client))
        trained = {name: tensor + 0.1 * change[name] for name, tensor in begun.items()}
        rows = 20 + CLIENTS.index(client)
        along = movement(
            {CLIENTS.index(client): 0.1, 10 + round_number: 0.2}
        )  # what zeroth-order training says of its steps
        observed = {name: tensor.square() for name, tensor in change.items()}
        told = Trained(trained, rows, 5, 1e-3, along, squares=observed)
        sent, _ = algorithm.finish(payload, None, told)
        result.append(Reply(client, round_number, rows, sent))
    return result


def after_one_round(algorithm: Method, clients: Sequence[str] = CLIENTS[:4]) -> ServerState:
    state = begin_state(algorithm)
    return algorithm.combine(state, replies(algorithm, state, clients, 1)).state


def fingerprint(state: ServerState) -> dict[str, object]:
    adapters: dict[str, object] = {
        f"adapter {name}": digest(adapter) for name, adapter in state.adapters.items()
    }
    return adapters | {
        f"number {name}": (tensor.dtype, tensor.tolist()) for name, tensor in state.numbers.items()
    }


def test_every_algorithm_of_the_table_is_under_contract() -> None:
    assert {settings.name for settings, _ in SETTINGS.values()} == set(METHODS)


def test_every_client_has_an_adapter_of_the_start_shape_before_and_after(
    algorithm: Method,
) -> None:
    for state in (begin_state(algorithm), after_one_round(algorithm)):
        for client in CLIENTS:
            assert same_shapes(algorithm.adapter_for(state, client), start_adapter())
            assert {tensor.dtype for tensor in algorithm.adapter_for(state, client).values()} == {
                torch.float32
            }


def test_the_first_round_starts_from_the_common_start(algorithm: Method) -> None:
    state = begin_state(algorithm)
    for client in CLIENTS:
        assert digest(algorithm.begin(algorithm.instruct(state, client), None).adapter) == digest(
            start_adapter()
        )


def test_combine_changes_neither_the_state_nor_the_replies(algorithm: Method) -> None:
    state = after_one_round(algorithm)
    sent = replies(algorithm, state, CLIENTS[1:5], 2)
    before = fingerprint(state), [digest(reply.payload.tensors["adapter"]) for reply in sent]
    algorithm.combine(state, sent)
    assert (
        fingerprint(state),
        [digest(reply.payload.tensors["adapter"]) for reply in sent],
    ) == before


def test_combine_twice_gives_the_same_bits(algorithm: Method) -> None:
    state = after_one_round(algorithm)
    sent = replies(algorithm, state, CLIENTS[1:5], 2)
    first, second = (algorithm.combine(state, sent) for _ in range(2))
    assert fingerprint(first.state) == fingerprint(second.state)
    assert first.diagnostics.clients == second.diagnostics.clients


def test_order_of_replies_is_irrelevant(algorithm: Method) -> None:
    state = after_one_round(algorithm)
    sent = replies(algorithm, state, CLIENTS[1:5], 2)
    assert fingerprint(algorithm.combine(state, sent).state) == fingerprint(
        algorithm.combine(state, sent[::-1]).state
    )


def test_a_personal_adapter_of_a_client_outside_the_round_is_the_same_object(
    algorithm: Method,
) -> None:
    state = after_one_round(algorithm)
    after = algorithm.combine(state, replies(algorithm, state, CLIENTS[1:3], 2)).state
    for client in (name for name in state.adapters if name in CLIENTS and name not in CLIENTS[1:3]):
        assert after.adapters[client] is state.adapters[client]


def put_back(algorithm: Method, payload: Payload) -> dict[str, Tensor]:
    """Which entries are sent as they were at the beginning: those that are frozen.

    Every entry has changed by the end.
    """
    begun = algorithm.begin(payload, None).adapter
    changed = {name: tensor + 1 for name, tensor in begun.items()}
    sent, _ = algorithm.finish(payload, None, Trained(changed, 20, 5, 1e-3, movement({1: 0.1})))
    return {name: tensor == begun[name] for name, tensor in sent.tensors["adapter"].items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_frozen_gets_no_step_in_local_training_and_everything_else_does(
    name: str, base: BaseModel
) -> None:
    """Real training on a tiny base, looked at before `finish`.

    Putting frozen entries back does not undo what they did to the others.
    """
    algorithm, targets = built(name), find_targets(base.model, ())
    state = algorithm.initial_state(dict.fromkeys(CLIENTS, drawn_start(targets, 4, 1)))
    payload = algorithm.instruct(state, CLIENTS[0])
    begun, frozen = algorithm.begin(payload, None), put_back(algorithm, payload)
    assert (name in FREEZING) == any(bool(part.any()) for part in frozen.values())
    task = LocalTask(begun.adapter, 4.0, draw_rows(6, 3, 0), seed=1, hook=begun.hook)
    (outcome,) = train_cohort(base, targets, [task], LocalSettings(steps=3, batch_size=4), 0.0, 400)
    assert not outcome.failure
    for parameter, part in frozen.items():
        still = outcome.adapter[parameter] == begun.adapter[parameter]
        assert bool(still[part].all()), f"{parameter}: a frozen entry was trained"
        assert bool(part.all()) or not bool(still[~part].all()), f"{parameter}: nothing was trained"


def test_replies_have_what_the_method_says_that_they_have_and_what_lacks_it_is_a_failure(
    algorithm: Method,
) -> None:
    state = after_one_round(algorithm)
    asked = [Request(name, 2, 0, algorithm.instruct(state, name)) for name in CLIENTS[:2]]
    sent = replies(algorithm, state, CLIENTS[:2], 2)
    assert complete(asked, sent, algorithm.returned) == sent
    bare = Payload({"adapter": sent[0].payload.tensors["adapter"]})
    found = complete(asked, [replace(sent[0], payload=bare), sent[1]], algorithm.returned)
    if algorithm.returned:
        assert isinstance(found[0], Failure) and repr(algorithm.returned[0]) in found[0].reason
    else:
        algorithm.combine(state, [replace(sent[0], payload=bare), sent[1]])
    for part in algorithm.returned:
        if part in sent[0].payload.tensors and part in asked[0].payload.tensors:
            cut = {name: tensor[:1] for name, tensor in sent[0].payload.tensors[part].items()}
            payload = replace(sent[0].payload, tensors={**sent[0].payload.tensors, part: cut})
            (wrong,) = complete(asked[:1], [replace(sent[0], payload=payload)], (part,))
            assert isinstance(wrong, Failure) and "expected float32" in wrong.reason


def test_one_client_in_a_round_is_enough(algorithm: Method) -> None:
    state = after_one_round(algorithm)
    after = algorithm.combine(state, replies(algorithm, state, CLIENTS[:1], 2)).state
    assert digest(algorithm.adapter_for(after, CLIENTS[0])) != digest(
        algorithm.adapter_for(state, CLIENTS[0])
    )


def test_clients_expected_to_move_do_not_keep_what_they_trained(algorithm: Method) -> None:
    state = after_one_round(algorithm)
    sent = replies(algorithm, state, CLIENTS[1:5], 2)
    combined = algorithm.combine(state, sent)
    trained: Mapping[str, Adapter] = {
        reply.client_id: reply.payload.tensors["adapter"] for reply in sent
    }
    assert combined.diagnostics.expects_motion <= set(trained)
    for client in combined.diagnostics.expects_motion:
        assert digest(algorithm.adapter_for(combined.state, client)) != digest(trained[client])
        assert combined.diagnostics.clients[client]["relative_pull"] > 0


def test_alternatives_to_what_the_server_made_are_whole_adapters_by_falling_share_down_to_none(
    algorithm: Method,
) -> None:
    own, aligned = lora(5), lora(6)
    before = digest(own), digest(aligned)
    found = algorithm.alternatives(own, aligned)
    assert bool(found) == algorithm.may_decline
    assert list(found) == sorted(found, reverse=True) and all(0 <= share < 1 for share in found)
    assert all(same_shapes(adapter, own) for adapter in found.values())
    if found:
        assert digest(found[0.0]) == digest(own)
    assert not algorithm.alternatives(own, dict(own)), "who was not moved has nothing to decline"
    assert (digest(own), digest(aligned)) == before


def saved_and_loaded(state: ServerState) -> ServerState:
    """Through the bytes of a safetensors file, which hold named tensors and nothing else.

    Their order is any.
    """
    flat = {
        f"adapters/{client}/{name}": tensor
        for client, adapter in state.adapters.items()
        for name, tensor in adapter.items()
    }
    flat |= {f"numbers/{name}": tensor for name, tensor in state.numbers.items()}
    flat = {name: tensor.clone() for name, tensor in flat.items()}
    adapters: dict[str, dict[str, Tensor]] = {client: {} for client in state.adapters}
    numbers: dict[str, Tensor] = {}
    for key, tensor in reversed(sorted(load(save(flat)).items())):
        kind, _, rest = key.partition("/")
        if kind == "numbers":
            numbers[rest] = tensor
        else:
            client, _, name = rest.partition("/")
            adapters[client][name] = tensor
    return ServerState(adapters, numbers)


def test_a_run_continues_bit_for_bit_from_a_saved_state(algorithm: Method) -> None:
    state = after_one_round(algorithm)
    loaded = saved_and_loaded(state)
    assert fingerprint(loaded) == fingerprint(state)
    for round_number, clients in ((2, CLIENTS[2:]), (3, CLIENTS[:3])):
        state = algorithm.combine(state, replies(algorithm, state, clients, round_number)).state
        loaded = algorithm.combine(loaded, replies(algorithm, loaded, clients, round_number)).state
    assert fingerprint(loaded) == fingerprint(state)


FOUNDERS, NEWCOMER = CLIENTS[:-1], CLIENTS[-1]


def founded(name: str) -> Method:
    """The method built for all clients but the last, with the same edges between them."""
    settings, graph = SETTINGS[name]
    if isinstance(graph, FixedGraph):
        edges = [edge for edge in graph.given.edges() if NEWCOMER not in edge[:2]]
        graph = FixedGraph(Graph.from_edges("random", FOUNDERS, edges))
    return settings.for_federation(
        replace(
            built(name).context,
            clients=FOUNDERS,
            rows=dict.fromkeys(FOUNDERS, 20),
            ranks=dict.fromkeys(FOUNDERS, 4),
            graph=graph,
        )
    )


# A shuffled graph puts every client into another's place, so that a config refuses it here.
STEADY = [
    name for name, (_, graph) in SETTINGS.items() if getattr(graph, "shuffle_seed", None) is None
]


@pytest.fixture(params=STEADY)
def before_and_after(request: pytest.FixtureRequest) -> tuple[Method, ServerState, Method]:
    """A run of some clients after two rounds, and the method for one client more."""
    few = founded(request.param)
    state = few.initial_state({client: start_adapter() for client in FOUNDERS})
    for number in (1, 2):
        state = few.combine(state, replies(few, state, FOUNDERS[:4], number)).state
    context = built(request.param).context
    if isinstance(context.graph, FixedGraph):
        edges = few.context.graph.given.edges()  # type: ignore[attr-defined]
        context = replace(context, graph=FixedGraph(Graph.from_edges("random", CLIENTS, edges)))
    many = SETTINGS[request.param][0].for_federation(replace(context, came={NEWCOMER: 3}))
    return few, state, many


def joined(method: Method, state: ServerState) -> ServerState:
    return method.joined(state, {client: start_adapter() for client in CLIENTS}, [NEWCOMER])


def test_a_newcomer_changes_no_bit_of_what_the_others_have(
    before_and_after: tuple[Method, ServerState, Method],
) -> None:
    few, state, many = before_and_after
    untouched = fingerprint(state)
    after = joined(many, state)
    assert fingerprint(state) == untouched
    for client in FOUNDERS:
        sent = [
            digest(method.instruct(of, client).tensors["adapter"])
            for method, of in ((few, state), (many, after))
        ]
        kept = [digest(m.adapter_for(of, client)) for m, of in ((few, state), (many, after))]
        assert sent[0] == sent[1] and kept[0] == kept[1]


def test_with_a_newcomer_the_state_has_the_form_that_it_would_have_had_with_it_from_the_start(
    before_and_after: tuple[Method, ServerState, Method],
) -> None:
    _, state, many = before_and_after
    after, fresh = joined(many, state), begin_state(many)
    assert set(fresh.adapters) <= set(after.adapters)
    assert set(fresh.numbers) <= set(after.numbers)
    for name, tensor in fresh.numbers.items():
        if tensor.ndim and len(tensor):  # not a list of edges or of steps, which has its own length
            assert after.numbers[name].shape == tensor.shape, name
    assert same_shapes(many.adapter_for(after, NEWCOMER), start_adapter())


def test_a_newcomer_trains_beside_the_others_from_its_first_round_on(
    before_and_after: tuple[Method, ServerState, Method],
) -> None:
    _, state, many = before_and_after
    state = joined(many, state)
    begun = digest(many.adapter_for(state, NEWCOMER))
    for number in (3, 4):
        state = many.combine(state, replies(many, state, (*FOUNDERS[:3], NEWCOMER), number)).state
    assert digest(many.adapter_for(state, NEWCOMER)) != begun
    assert same_shapes(many.adapter_for(state, NEWCOMER), start_adapter())


def test_every_method_of_the_table_says_that_it_takes_newcomers_and_one_of_ones_own_does_not() -> (
    None
):
    assert all(type(settings).takes_newcomers for settings, _ in SETTINGS.values())

    class Kept(Local):
        """A method that extends another and makes a state of its own."""

        def initial_state(self, starts: Mapping[str, Adapter]) -> ServerState:
            return ServerState(dict(starts))

    class Same(Local):
        """A method that only steps otherwise."""

    assert not Kept.takes_newcomers and Same.takes_newcomers
