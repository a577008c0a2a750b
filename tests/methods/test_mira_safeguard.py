"""What a client may have in place of what MIRA made of its adapter.

Half of the way, and what it sent itself.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedmira.adapters import Adapter, content_hash
from fedmira.messages import Payload
from fedmira.methods import Method, Mira, Trained
from lora_federation import best_of_rank, context, dense, lora, replies, started

RANK = 4
FEDERATION = context([RANK, RANK, 2])
SAFE, PLAIN = (Mira(safeguard=chosen).for_federation(FEDERATION) for chosen in (True, False))
FACTORS = Mira(safeguard=True, space="factor").for_federation(
    replace(FEDERATION, ranks=dict.fromkeys(FEDERATION.clients, RANK))
)


def hashes(adapters: dict[float, Adapter]) -> dict[float, str]:
    return {share: content_hash(adapter) for share, adapter in adapters.items()}


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_half_way_is_the_best_approximation_of_the_mean_of_both_products(rank: int) -> None:
    own, aligned = lora(rank, 1), lora(rank, 2)
    half = dense(SAFE.alternatives(own, aligned)[0.5])
    for module, update in dense(own).items():
        expected = best_of_rank((update + dense(aligned)[module]) / 2, rank)
        torch.testing.assert_close(
            half[module], expected, rtol=0, atol=1e-5 * float(expected.norm())
        )


def test_half_way_is_exact_where_the_rank_holds_the_mean() -> None:
    own = lora(RANK, 1)
    aligned = {name: tensor * (-3.0 if ".lora_B." in name else 1.0) for name, tensor in own.items()}
    half = dense(SAFE.alternatives(own, aligned)[0.5])
    for module, update in dense(own).items():  # (1 - 3) / 2
        torch.testing.assert_close(half[module], -update, rtol=0, atol=1e-5 * float(update.norm()))


def test_half_way_between_factors_is_the_mean_of_each() -> None:
    own, aligned = lora(RANK, 1), lora(RANK, 2)
    half = FACTORS.alternatives(own, aligned)[0.5]
    for name, tensor in half.items():
        torch.testing.assert_close(
            tensor.double(), (own[name].double() + aligned[name].double()) / 2, rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("algorithm", [SAFE, FACTORS], ids=["product", "factor"])
def test_none_of_the_way_is_what_the_client_sent_and_the_choice_begins_there(
    algorithm: Method,
) -> None:
    own, aligned = lora(RANK, 1), lora(RANK, 2)
    begun = algorithm.begin(Payload({"adapter": aligned}), Payload({"own": own}))
    assert begun.adapter is aligned and begun.hook is None
    assert hashes(dict(begun.alternatives)) == hashes(dict(algorithm.alternatives(own, aligned)))
    assert list(begun.alternatives) == [0.5, 0.0] and begun.alternatives[0.0] is own


def test_there_is_no_choice_before_training_nor_without_a_pull_or_the_safeguard() -> None:
    own, aligned = lora(RANK, 1), lora(RANK, 2)
    assert not SAFE.begin(Payload({"adapter": aligned}), None).alternatives
    assert not SAFE.begin(
        Payload({"adapter": aligned}), Payload({"optimizer.first": own})
    ).alternatives
    assert not SAFE.begin(Payload({"adapter": own}), Payload({"own": dict(own)})).alternatives
    assert not PLAIN.begin(Payload({"adapter": aligned}), Payload({"own": own})).alternatives
    assert SAFE.may_decline and not PLAIN.may_decline


def test_a_client_remembers_exactly_what_it_sends_and_sends_no_more_with_the_safeguard() -> None:
    trained = Trained(lora(RANK, 3), 20, 5, 1e-3)
    sent, memory = SAFE.finish(Payload({"adapter": lora(RANK, 1)}), None, trained)
    plain, nothing = PLAIN.finish(Payload({"adapter": lora(RANK, 1)}), None, trained)
    assert (
        memory is not None
        and set(memory.tensors) == {"own"}
        and not memory.scalars
        and nothing is None
    )
    assert (
        content_hash(memory.tensors["own"])
        == content_hash(sent.tensors["adapter"])
        == content_hash(plain.tensors["adapter"])
    )
    assert sent.num_bytes == plain.num_bytes


def test_the_server_does_the_same_with_the_safeguard_and_without() -> None:
    trained = {
        client: lora(FEDERATION.ranks[client], 10 + k)
        for k, client in enumerate(FEDERATION.clients)
    }
    after = [
        algorithm.combine(started(algorithm, FEDERATION), replies(FEDERATION, trained))
        for algorithm in (SAFE, PLAIN)
    ]
    for client in FEDERATION.clients:
        own = [content_hash(combined.state.adapters[client]) for combined in after]
        assert own[0] == own[1] != content_hash(trained[client])
    assert (
        after[0].diagnostics.expects_motion
        == after[1].diagnostics.expects_motion
        == set(FEDERATION.clients)
    )


def test_the_choice_is_made_at_the_rank_of_the_client() -> None:
    own, aligned = lora(2, 1), lora(2, 2)
    assert {
        name: tensor.shape for name, tensor in SAFE.alternatives(own, aligned)[0.5].items()
    } == {name: tensor.shape for name, tensor in own.items()}
