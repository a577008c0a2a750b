"""FedEx: trained part and residual together are the mean of what the clients trained.

As long as the residual fits.
"""

from __future__ import annotations

import pytest
import torch

from fedmira.adapters import digest
from fedmira.errors import ConfigError
from fedmira.methods import FedEx
from fedmira.methods.parts.rank_split import RankSplit
from lora_federation import context, dense, lora, names, play, start, started

ROWS = [10, 30, 20]


def test_the_shared_product_is_the_mean_of_the_clients_products_round_after_round() -> None:
    """The residual of a round has at most 4 directions, 3 clients and their mean.

    So 11 hold those of two rounds.
    """
    federation = context([12] * 3, ROWS)
    algorithm = FedEx(trained_rank=1).for_federation(federation)
    state = started(algorithm, federation)
    for number in (1, 2):
        state, sent = play(
            algorithm,
            federation,
            state,
            {c: lora(12, 50 * number + k) for k, c in enumerate(names(3))},
            number,
        )
        for module, found in dense(algorithm.adapter_for(state, "client-0")).items():
            mean = sum(
                reply.num_examples / 60 * dense(reply.payload.tensors["adapter"])[module]
                for reply in sent
            )
            torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-5 * float(mean.abs().max()))


def test_the_trained_part_is_the_mean_of_factors_and_truncation_says_what_did_not_fit() -> None:
    federation = context([4] * 3, ROWS)
    algorithm = FedEx(trained_rank=3).for_federation(federation)
    split = RankSplit(3)
    state = started(algorithm, federation)
    sent = play(
        algorithm, federation, state, {c: lora(4, 50 + k) for k, c in enumerate(names(3))}, 1
    )[1]
    combined = algorithm.combine(state, sent)
    given = algorithm.adapter_for(combined.state, "client-0")
    squares = 0.0
    for name, found in split.trained(given).items():
        mean = sum(
            reply.num_examples / 60 * split.trained(reply.payload.tensors["adapter"])[name]
            for reply in sent
        )
        torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-5)
    for module, found in dense(given, 16 / 4).items():
        exact = sum(
            reply.num_examples / 60 * dense(reply.payload.tensors["adapter"], 16 / 4)[module]
            for reply in sent
        )
        squares += float((exact - found).square().sum())
    assert squares**0.5 > 0.01
    assert combined.diagnostics.round["truncation"] == pytest.approx(squares**0.5, rel=1e-3)


def test_the_residual_is_frozen_and_does_not_travel_up() -> None:
    federation = context([6] * 3, ROWS)
    algorithm = FedEx().for_federation(federation)
    split, state = RankSplit(3), started(algorithm, federation)
    for number in (1, 2):
        before = state
        state, sent = play(
            algorithm,
            federation,
            before,
            {c: lora(6, 50 * number + k) for k, c in enumerate(names(3))},
            number,
        )
        for reply in sent:
            kept = split.frozen(algorithm.adapter_for(before, reply.client_id))
            assert digest(split.frozen(reply.payload.tensors["adapter"])) == digest(kept)
            assert reply.payload.num_bytes == 4 * sum(
                tensor.numel() for tensor in start(3).values()
            )


@pytest.mark.parametrize(("rank", "trained_rank"), [(1, 0), (4, 4), (4, 6)])
def test_a_rank_without_room_for_both_parts_is_refused(rank: int, trained_rank: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"client 'client-0' has rank {rank}.*both parts need at least 1"
    ):
        FedEx(trained_rank=trained_rank).for_federation(context([rank] * 2))
