"""FedProx: the closed form of its local steps, and FedAvg where nothing pulls."""

from __future__ import annotations

import pytest
import torch

from fedmira.errors import ConfigError
from fedmira.methods import FedAvg, FedProx
from lora_federation import context, descend, lora, names, play, started


def test_local_steps_approach_the_middle_between_own_minimum_and_shared_adapter() -> None:
    """Descent on 1/2 |w - c|^2 + mu / 2 |w - w0|^2.

    W_n = w* + (1 - rate (1 + mu))^n (w0 - w*) with w* = (c + mu w0) / (1 + mu).
    """
    mu, rate, steps = 0.8, 0.25, 5
    federation = context([3, 3])
    algorithm = FedProx(proximal=mu).for_federation(federation)
    state, _ = play(
        algorithm,
        federation,
        started(algorithm, federation),
        {c: lora(3, 7 + i) for i, c in enumerate(names(2))},
        1,
    )
    payload, centre = algorithm.instruct(state, "client-1"), lora(3, 20)
    found = descend(algorithm.begin(payload, None), centre, steps, rate)
    for name, first in payload.tensors["adapter"].items():
        resting = (centre[name] + mu * first) / (1 + mu)
        torch.testing.assert_close(
            found[name],
            resting + (1 - rate * (1 + mu)) ** steps * (first - resting),
            rtol=1e-5,
            atol=1e-5,
        )


def test_without_a_pull_it_is_fedavg_bit_for_bit() -> None:
    federation = context([3, 3, 3], [10, 30, 20])
    states = []
    for settings in (FedProx(proximal=0), FedAvg()):
        algorithm = settings.for_federation(federation)
        assert (
            algorithm.begin(
                algorithm.instruct(started(algorithm, federation), "client-0"), None
            ).hook
            is None
        )
        state = started(algorithm, federation)
        for number in (1, 2):
            state, _ = play(
                algorithm,
                federation,
                state,
                {c: lora(3, 7 + i) for i, c in enumerate(names(3))},
                number,
            )
        states.append(algorithm.adapter_for(state, "client-0"))
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])


def test_different_ranks_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"fedprox: client 'client-0' has rank 2 and client 'client-1' rank 3"
    ):
        FedProx().for_federation(context([2, 3]))
