"""FOLA: products of Gaussians by hand, the prior's gradient by differences, FedAvg as a limit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedmira.adapters import Adapter, digest, map_tensors, weighted_sum
from fedmira.config import load_config
from fedmira.errors import ConfigError
from fedmira.messages import Payload, Reply
from fedmira.methods import FedAvg, Fola, ServerState, Trained
from lora_federation import context, lora, names, started

RANK = 2
FEDERATION = context([RANK, RANK], [10, 30])
ONE, OTHER = lora(RANK, 5), lora(RANK, 6)


def built(**settings: Any) -> Fola:
    return Fola(**settings).for_federation(FEDERATION)


def filled(value: float) -> Adapter:
    return map_tensors(lambda tensor: torch.full_like(tensor, value), ONE)


def reply(client: str, adapter: Adapter, precision: Adapter, rows: int = 10) -> Reply:
    return Reply(client, 1, rows, Payload({"adapter": adapter, "precision": precision}))


def combined(
    algorithm: Fola, *given: tuple[Adapter, Adapter], rows: tuple[int, ...] = (10, 10)
) -> ServerState:
    replies = [
        reply(client, adapter, precision, count)
        for client, (adapter, precision), count in zip(names(2), given, rows, strict=True)
    ]
    return algorithm.combine(started(algorithm, FEDERATION), replies).state


def assert_close(found: Adapter, expected: Adapter, atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=atol)


def test_equal_precisions_without_damping_are_fedavg() -> None:
    state = combined(built(damping=0), (ONE, filled(0.3)), (OTHER, filled(0.3)), rows=(10, 30))
    assert_close(state.adapters["shared"], weighted_sum([ONE, OTHER], [0.25, 0.75]))
    assert_close(state.adapters["precision"], filled(0.3))


def test_damping_leaves_its_share_of_the_adapter_before() -> None:
    """With all precisions W, e is 0.01 W: (0.01 w_t + the mean) / 1.01."""
    algorithm = built()
    before = started(algorithm, FEDERATION).adapters["shared"]
    state = combined(algorithm, (ONE, filled(0.3)), (OTHER, filled(0.3)))
    mean = weighted_sum([before, ONE, OTHER], [0.01 / 1.01, 0.5 / 1.01, 0.5 / 1.01])
    assert_close(state.adapters["shared"], mean)


def test_values_1_and_3_with_precisions_1_and_3_give_two_and_a_half() -> None:
    state = combined(built(damping=0), (filled(1), filled(1)), (filled(3), filled(3)))
    assert_close(state.adapters["shared"], filled(2.5))
    assert_close(state.adapters["precision"], filled(2))


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_what_nobody_observed_stays_as_it_was(damping: float) -> None:
    algorithm = built(damping=damping)
    before = started(algorithm, FEDERATION).adapters["shared"]
    state = combined(algorithm, (ONE, filled(0)), (OTHER, filled(0)))
    assert digest(state.adapters["shared"]) == digest(before)
    seen = {name: (torch.arange(t.numel()) % 2).reshape(t.shape).float() for name, t in ONE.items()}
    half = combined(algorithm, (ONE, seen), (ONE, seen)).adapters["shared"]
    for name, tensor in half.items():
        assert torch.equal(tensor[seen[name] == 0], before[name][seen[name] == 0])
        expected = (ONE[name] + damping / 2 * before[name]) / (1 + damping / 2)  # mean(W) is 1/2
        torch.testing.assert_close(tensor[seen[name] == 1], expected[seen[name] == 1])


def test_a_client_that_knows_an_entry_far_better_decides_it() -> None:
    state = combined(built(damping=0), (ONE, filled(1e6)), (OTHER, filled(1e-6)))
    assert_close(state.adapters["shared"], ONE, atol=1e-5)


def test_a_precision_that_rounding_left_below_zero_counts_as_none() -> None:
    below = combined(built(damping=0), (ONE, filled(-1e-9)), (OTHER, filled(1)))
    assert_close(below.adapters["shared"], OTHER)


def test_precisions_add_up_over_rounds() -> None:
    """A client's begins from the server's, and everybody's is their mean by rows."""
    algorithm = built(prior=0)
    state, observed = started(algorithm, FEDERATION), {"client-0": 0.2, "client-1": 0.4}
    for number in (1, 2):
        sent = []
        for client, value in observed.items():
            payload = algorithm.instruct(state, client)
            assert payload.scalars["round"] == number
            begun = algorithm.begin(payload, None)
            assert begun.squares and begun.hook is None
            trained = Trained(begun.adapter, 10, 5, 1e-3, squares=filled(number * value))
            answer, kept = algorithm.finish(payload, None, trained)
            assert kept is None
            sent.append(Reply(client, number, FEDERATION.rows[client], answer))
        state = algorithm.combine(state, sent).state
    mean = 0.25 * 0.2 + 0.75 * 0.4
    assert_close(state.adapters["precision"], filled((1 + 2) * mean))
    assert int(state.numbers["round"]) == 2


def test_without_a_prior_and_with_one_precision_a_round_is_that_of_fedavg() -> None:
    algorithm, plain = built(prior=0, damping=0), FedAvg().for_federation(FEDERATION)
    state, expected = (started(each, FEDERATION) for each in (algorithm, plain))
    for number in (1, 2):
        adapters = {client: lora(RANK, 10 * number + k) for k, client in enumerate(names(2))}
        sent, same = [], []
        for client, adapter in adapters.items():
            payload = algorithm.instruct(state, client)
            assert digest(algorithm.begin(payload, None).adapter) == digest(
                state.adapters["shared"]
            )
            rows = FEDERATION.rows[client]
            trained = Trained(adapter, rows, 5, 1e-3, squares=filled(0.1))
            sent.append(Reply(client, number, rows, algorithm.finish(payload, None, trained)[0]))
            same.append(Reply(client, number, rows, Payload({"adapter": adapter})))
        state, expected = algorithm.combine(state, sent).state, plain.combine(expected, same).state
        assert_close(state.adapters["shared"], expected.adapters["shared"])


@pytest.mark.parametrize("number", [1, 4])
def test_the_hook_adds_the_gradient_of_the_prior(number: int) -> None:
    """prior / (2 t) sum W / mean(W) (w - w_t)^2, by central differences in float64."""
    prior = 0.7
    precision = map_tensors(torch.square, lora(RANK, 8))
    payload = Payload({"adapter": ONE, "precision": precision}, {"round": float(number)})
    hook = built(prior=prior).begin(payload, None).hook
    assert hook is not None
    entries = sum(tensor.numel() for tensor in precision.values())
    mean = sum(float(tensor.sum()) for tensor in precision.values()) / entries

    def energy(adapter: Mapping[str, torch.Tensor]) -> float:
        total = sum(
            float((precision[name].double() * (adapter[name] - ONE[name].double()).square()).sum())
            for name in ONE
        )
        return prior / (2 * number) * total / mean

    found = hook(filled(0.5), OTHER)
    at = {name: tensor.double() for name, tensor in OTHER.items()}
    for name, tensor in found.items():
        for place in (0, tensor.numel() - 1):
            step = torch.zeros(tensor.numel(), dtype=torch.float64)
            step[place] = 1e-4
            up, down = (
                energy({**at, name: at[name] + sign * step.reshape(tensor.shape)})
                for sign in (1, -1)
            )
            slope = (up - down) / 2e-4
            assert float(tensor.flatten()[place]) == pytest.approx(0.5 + slope, rel=1e-4, abs=1e-6)


def test_twice_the_bytes_of_fedavg_travel_both_ways() -> None:
    algorithm, plain = built(), FedAvg().for_federation(FEDERATION)
    state = started(algorithm, FEDERATION)
    payload = algorithm.instruct(state, "client-0")
    size = plain.instruct(started(plain, FEDERATION), "client-0").num_bytes
    assert payload.num_bytes == 2 * size + 8  # and the number of the round
    trained = Trained(payload.tensors["adapter"], 10, 5, 1e-3, squares=filled(0.1))
    assert algorithm.finish(payload, None, trained)[0].num_bytes == 2 * size


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="fola: client 'client-0' has rank 2"):
        Fola().for_federation(context([2, 4]))
    with pytest.raises((ConfigError, ValidationError), match="which adds up squared gradients"):
        load_config(overrides=["algorithm.name=fola", "local.optimizer=zeroth-order"])
