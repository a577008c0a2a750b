"""Methods that work entry by entry keep the contract with adapters that are no LoRA factors.

The others are refused by the config.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from fedmira.adapters import (
    Adapter,
    digest,
    norm,
    same_shapes,
    subtract,
    weighted_sum,
)
from fedmira.adapters.directions import movement
from fedmira.config import Config, load_config
from fedmira.config.methods import METHODS, ChosenMethod, Need
from fedmira.errors import ConfigError
from fedmira.graphs import (
    FixedGraph,
    GraphSource,
    LearnedGraph,
    uniform_graph,
)
from fedmira.messages import Reply
from fedmira.methods import Method, MethodContext, ServerState, Trained

CLIENTS = tuple(f"client-{k}" for k in range(6))
FIXED = FixedGraph(uniform_graph(CLIENTS))
ENTRYWISE: dict[str, tuple[dict[str, Any], GraphSource]] = {
    "local": ({"name": "local"}, FIXED),
    "fedavg": ({"name": "fedavg"}, FIXED),
    "fedit-finetune": ({"name": "fedit-finetune"}, FIXED),
    "fedprox": ({"name": "fedprox"}, FIXED),
    "ditto": ({"name": "ditto"}, FIXED),
    "fedopt": ({"name": "fedopt"}, FIXED),
    "scaffold": ({"name": "scaffold"}, FIXED),
    "fola": ({"name": "fola"}, FIXED),
    "fedkseed": ({"name": "fedkseed"}, FIXED),
    "mira": ({"name": "mira", "space": "factor"}, FIXED),
    "mira, learned graph": (
        {"name": "mira", "space": "factor", "safeguard": True},
        LearnedGraph(nearest=2, warmup_rounds=0),
    ),
    "mira, sketched": (
        {"name": "mira", "space": "factor"},
        LearnedGraph(nearest=2, warmup_rounds=0, sketch=64),
    ),
}
REFUSED = sorted(set(METHODS) - {settings["name"] for settings, _ in ENTRYWISE.values()})


def encoder(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "prompt_encoder.embedding.weight": (5, 8),
        "prompt_encoder.mlp_head.0.weight": (6, 8),
        "prompt_encoder.mlp_head.0.bias": (6,),
    }
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


START = encoder(0)


def built(settings: dict[str, Any], graph: GraphSource) -> Method:
    context = MethodContext(
        CLIENTS,
        dict.fromkeys(CLIENTS, 20),
        dict.fromkeys(CLIENTS, 0),
        16.0,
        graph,
        cohort=4,
        rounds=3,
    )
    return TypeAdapter(ChosenMethod).validate_python(settings).for_federation(context)


@pytest.fixture(params=ENTRYWISE)
def algorithm(request: pytest.FixtureRequest) -> Method:
    return built(*ENTRYWISE[request.param])


def begin_state(algorithm: Method) -> ServerState:
    return algorithm.initial_state(dict.fromkeys(CLIENTS, START))


def replies(
    algorithm: Method,
    state: ServerState,
    clients: Sequence[str],
    round_number: int,
    families: Sequence[int] | None = None,
) -> list[Reply]:
    """Local training that moves each client by numbers of its own, or of its family.

    The family's numbers are mostly those that count.
    """
    result = []
    for client in clients:
        k = CLIENTS.index(client)
        payload = algorithm.instruct(state, client)
        change = encoder(1000 * round_number + k)
        if families is not None:
            change = weighted_sum([encoder(77 + families[k]), change], [1.0, 0.2])
        trained = weighted_sum([algorithm.begin(payload, None).adapter, change], [1.0, 0.1])
        along = movement({k: 0.1, 10 + round_number: 0.2})
        observed = {name: tensor.square() for name, tensor in change.items()}
        told = Trained(trained, 20 + k, 5, 1e-3, along, squares=observed)
        sent, _ = algorithm.finish(payload, None, told)
        result.append(Reply(client, round_number, 20 + k, sent))
    return result


def fingerprint(state: ServerState) -> dict[str, object]:
    adapters: dict[str, object] = {
        f"adapter {name}": digest(adapter) for name, adapter in state.adapters.items()
    }
    return adapters | {
        f"number {name}": (tensor.dtype, tensor.tolist()) for name, tensor in state.numbers.items()
    }


def test_states_are_pure_ordered_and_of_the_start_shape(algorithm: Method) -> None:
    state = begin_state(algorithm)
    for client in CLIENTS:
        assert digest(algorithm.begin(algorithm.instruct(state, client), None).adapter) == digest(
            START
        )
    for round_number, clients in ((1, CLIENTS[:4]), (2, CLIENTS[2:]), (3, CLIENTS[:1])):
        sent = replies(algorithm, state, clients, round_number)
        before = fingerprint(state)
        first, second = algorithm.combine(state, sent), algorithm.combine(state, sent[::-1])
        assert fingerprint(state) == before and fingerprint(first.state) == fingerprint(
            second.state
        )
        for client in first.diagnostics.expects_motion:
            assert first.diagnostics.clients[client]["relative_pull"] > 0
        state = first.state
        assert all(same_shapes(algorithm.adapter_for(state, client), START) for client in CLIENTS)


def test_a_learned_graph_finds_families_among_the_ways_from_the_start() -> None:
    """The start is common and far larger than what training changes.

    Inner products of whole adapters would see nothing else.
    """
    for sketch in (0, 512):
        algorithm = built(
            {"name": "mira", "space": "factor"},
            LearnedGraph(nearest=1, warmup_rounds=0, memory=0.0, sketch=sketch),
        )
        families = [0, 0, 1, 1, 2, 2]
        state = begin_state(algorithm)
        combined = algorithm.combine(state, replies(algorithm, state, CLIENTS, 1, families))
        graph = combined.diagnostics.graph
        assert graph is not None
        assert {tuple(sorted(families[k] for k in pair)) for pair in graph.pairs.tolist()} == {
            (0, 0),
            (1, 1),
            (2, 2),
        }


def test_the_pull_is_measured_on_the_way_from_the_start() -> None:
    algorithm = built(
        {"name": "mira", "space": "factor", "size_scale": 0.0, "coupling": 0.5}, FIXED
    )
    state = begin_state(algorithm)
    sent = replies(algorithm, state, CLIENTS, 1)
    combined = algorithm.combine(state, sent)
    uploads: dict[str, Adapter] = {
        reply.client_id: reply.payload.tensors["adapter"] for reply in sent
    }
    for client, adapter in uploads.items():
        others = [uploads[other] for other in CLIENTS if other != client]
        expected = weighted_sum(
            [adapter, *others], [0.5, *[0.1] * 5]
        )  # half of the way to the mean of the five others
        after = combined.state.adapters[client]
        assert norm(subtract(after, expected)) < 1e-5
        moved = norm(subtract(after, adapter)) / norm(subtract(adapter, START))
        assert combined.diagnostics.clients[client]["relative_pull"] == pytest.approx(
            moved, rel=1e-5
        )


def test_a_client_may_decline_half_or_all_of_a_pull() -> None:
    algorithm = built({"name": "mira", "space": "factor", "safeguard": True}, FIXED)
    own, aligned = encoder(1), encoder(2)
    found = algorithm.alternatives(own, aligned)
    assert list(found) == [0.5, 0.0] and digest(found[0.0]) == digest(own)
    assert norm(subtract(found[0.5], weighted_sum([own, aligned], [0.5, 0.5]))) < 1e-6


@pytest.mark.parametrize("kind", ["p-tuning", "prompt", "prefix"])
@pytest.mark.parametrize("name", [*REFUSED, "mira"])
def test_methods_that_need_factors_are_refused_with_a_remedy(name: str, kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            overrides=[
                "data.validation_fraction=0.1",
                f"adapter.kind={kind}",
                f"algorithm.name={name}",
            ]
        )
    remedy = (
        "set algorithm.space = 'factor'"
        if name == "mira"
        else f"algorithm.name = '{name}', which works on LoRA's factors"
    )
    assert f"adapter.kind = '{kind}' does not go with" in str(caught.value) and remedy in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("adapter.ranks.one=4", "ranks is set, but adapters of kind 'prompt' have no rank"),
        (
            "adapter.rank_types.one=mid",
            "rank_types is set, but adapters of kind 'prompt' have no rank",
        ),
        (
            "adapter.rank_distribution=uniform",
            "rank_distribution is set, but adapters of kind 'prompt' have no rank",
        ),
        ("engine.recompute=true", "engine.recompute goes with adapter.kind = 'lora' only"),
        (
            "graph.measure=principal-angles",
            "compares column spaces of B A, which adapter.kind = 'prompt' has not",
        ),
    ],
)
def test_settings_of_lora_alone_are_refused_with_the_other_kinds(setting: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=["adapter.kind=prompt", "algorithm.name=fedavg", setting])
    assert words in str(caught.value)


def test_every_method_is_on_one_of_the_two_lists() -> None:
    for name in METHODS:
        settings = TypeAdapter(ChosenMethod).validate_python({"name": name})
        assert (Need.FACTORS in settings.needs) == (name in REFUSED or name == "mira")
    entrywise = ["adapter.kind=prefix", "algorithm.name=mira", "algorithm.space=factor"]
    assert isinstance(load_config(overrides=entrywise), Config)
