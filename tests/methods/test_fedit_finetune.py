"""FedIT, then local fine-tuning: when rounds change over, what is averaged, and what travels."""

from __future__ import annotations

import pytest
import torch

from fedmira.adapters import digest, map_tensors
from fedmira.errors import ConfigError
from fedmira.methods import FedAvg, FedItFinetune
from lora_federation import context, lora, names, play, start, started

CENTRES = {client: lora(3, 7 + k) for k, client in enumerate(names(3))}


@pytest.mark.parametrize(
    ("share", "rounds", "shared"),
    [(0.5, 4, 2), (0.5, 5, 3), (0.25, 8, 6), (0.1, 5, 4), (0.9, 2, 1), (0.99, 100, 1)],
)
def test_the_share_is_rounded_down_and_leaves_a_round_for_each_part(
    share: float, rounds: int, shared: int
) -> None:
    algorithm = FedItFinetune(finetune_share=share).for_federation(context([3, 3], rounds=rounds))
    assert isinstance(algorithm, FedItFinetune)
    assert algorithm.shared_rounds == shared


def test_first_rounds_are_fedit_and_the_last_ones_local_training_from_its_result() -> None:
    federation = context([3, 3, 3], [10, 30, 20], rounds=4)
    fedit, tuned = (
        FedAvg().for_federation(federation),
        FedItFinetune().for_federation(federation),
    )
    reference, state = started(fedit, federation), started(tuned, federation)
    for number in (1, 2):
        reference, _ = play(fedit, federation, reference, CENTRES, number)
        state, _ = play(tuned, federation, state, CENTRES, number)
    shared = fedit.adapter_for(reference, "client-0")
    assert all(digest(tuned.adapter_for(state, client)) == digest(shared) for client in names(3))
    for number in (3, 4):
        state, _ = play(tuned, federation, state, dict(list(CENTRES.items())[:2]), number)
    for client in names(2):
        expected = map_tensors(lambda c, w: c + 0.75**6 * (w - c), CENTRES[client], shared)
        for name, found in tuned.adapter_for(state, client).items():
            torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-5)
    assert digest(tuned.adapter_for(state, "client-2")) == digest(shared), (
        "a client that was not drawn keeps the shared adapter"
    )


def test_of_fine_tuning_the_shared_adapter_travels_once() -> None:
    federation = context([3, 3, 3], rounds=5)
    algorithm = FedItFinetune().for_federation(federation)
    state = started(algorithm, federation)
    whole, flag = 4 * sum(tensor.numel() for tensor in start(3).values()), 8
    down, up = [], []
    for number in range(1, 6):
        down.append(algorithm.instruct(state, "client-0").num_bytes)
        state, sent = play(algorithm, federation, state, CENTRES, number)
        up.append(sent[0].payload.num_bytes)
    assert down == [whole, whole, whole, whole + flag, flag]
    assert up == [whole, whole, whole, 0, 0]


def test_one_round_cannot_be_divided() -> None:
    with pytest.raises(ConfigError, match=r"rounds\.count is 1; needs at least 2"):
        FedItFinetune().for_federation(context([3, 3], rounds=1))
