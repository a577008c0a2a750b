"""Sharing one factor: which one is averaged, which one stays, what is frozen, and what travels."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from fedmira.adapters import digest
from fedmira.errors import ConfigError
from fedmira.methods import ShareFactor, Trained
from lora_federation import context, dense, lora, names, play, replies, start, started

FEDERATION = context([3, 3, 3], [10, 30, 20])
TRAINED = {client: lora(3, 30 + k) for k, client in enumerate(names(3))}
MARK = {"A": ".lora_A.", "B": ".lora_B."}


def settings(
    shared: Literal["A", "B"], private: Literal["trained", "frozen"] = "trained"
) -> ShareFactor:
    return ShareFactor(shared_factor=shared, private_factor=private)


@pytest.mark.parametrize("shared", ["A", "B"])
def test_the_shared_factor_is_the_mean_by_rows_and_the_other_one_is_each_clients_own(
    shared: Literal["A", "B"],
) -> None:
    algorithm = settings(shared).for_federation(FEDERATION)
    state = algorithm.combine(started(algorithm, FEDERATION), replies(FEDERATION, TRAINED)).state
    for client in names(3):
        for name, found in algorithm.adapter_for(state, client).items():
            if MARK[shared] in name:
                expected = (
                    10 * TRAINED["client-0"][name]
                    + 30 * TRAINED["client-1"][name]
                    + 20 * TRAINED["client-2"][name]
                ) / 60
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(found, TRAINED[client][name])


@pytest.mark.parametrize("shared", ["A", "B"])
def test_a_client_outside_the_round_gets_the_new_shared_factor_beside_its_old_private_one(
    shared: Literal["A", "B"],
) -> None:
    algorithm = settings(shared).for_federation(FEDERATION)
    state = algorithm.combine(
        started(algorithm, FEDERATION), replies(FEDERATION, {"client-0": TRAINED["client-0"]})
    ).state
    for name, found in algorithm.adapter_for(state, "client-2").items():
        assert torch.equal(
            found, TRAINED["client-0"][name] if MARK[shared] in name else start(3)[name]
        )


def test_with_frozen_a_all_end_with_one_adapter_whose_product_is_the_mean_of_products() -> None:
    algorithm = settings("B", "frozen").for_federation(FEDERATION)
    state, sent = play(algorithm, FEDERATION, started(algorithm, FEDERATION), TRAINED, 1)
    for client in names(3):
        given = algorithm.adapter_for(state, client)
        assert all(
            torch.equal(tensor, start(3)[name])
            for name, tensor in given.items()
            if ".lora_A." in name
        )
        for module, found in dense(given).items():
            mean = sum(
                reply.num_examples / 60 * dense(reply.payload.tensors["adapter"])[module]
                for reply in sent
            )
            torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-5)


def test_a_frozen_factor_is_put_back_whatever_happened_to_it() -> None:
    """Decoupled weight decay moves parameters that have no gradient."""
    algorithm = settings("B", "frozen").for_federation(FEDERATION)
    payload = algorithm.instruct(started(algorithm, FEDERATION), "client-0")
    decayed = {name: 0.99 * tensor for name, tensor in TRAINED["client-0"].items()}
    answer, _ = algorithm.finish(payload, None, Trained(decayed, 10, 5, 1e-3))
    for name, tensor in answer.tensors["adapter"].items():
        assert torch.equal(tensor, start(3)[name] if ".lora_A." in name else decayed[name])


@pytest.mark.parametrize(
    ("shared", "private"), [("A", "trained"), ("B", "trained"), ("B", "frozen")]
)
def test_only_the_shared_factor_travels(
    shared: Literal["A", "B"], private: Literal["trained", "frozen"]
) -> None:
    algorithm = settings(shared, private).for_federation(FEDERATION)
    state = started(algorithm, FEDERATION)
    expected = 4 * sum(tensor.numel() for name, tensor in start(3).items() if MARK[shared] in name)
    assert algorithm.instruct(state, "client-0").num_bytes == expected
    _, sent = play(algorithm, FEDERATION, state, TRAINED, 1)
    assert {reply.payload.num_bytes for reply in sent} == {expected}


def test_trained_private_factors_have_no_hook_and_differ_after_a_round() -> None:
    algorithm = settings("A").for_federation(FEDERATION)
    state = started(algorithm, FEDERATION)
    assert algorithm.begin(algorithm.instruct(state, "client-0"), None).hook is None
    state, _ = play(algorithm, FEDERATION, state, TRAINED, 1)
    assert len({digest(algorithm.adapter_for(state, client)) for client in names(3)}) == 3


def test_a_frozen_b_and_different_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="a frozen B learns nothing"):
        settings("A", "frozen")
    with pytest.raises(ConfigError, match=r"share-factor: client 'client-0' has rank 2"):
        settings("A").for_federation(context([2, 3]))
