"""FedOpt: the server's steps against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fedmira.adapters import Adapter, digest
from fedmira.config import load_config
from fedmira.errors import ConfigError
from fedmira.methods import FedAvg, FedOpt, Method
from lora_federation import context, lora, names, play, replies, started

NAME = "m.q_proj.lora_B.weight"
"""B is zero at the start, so that one entry tells the whole step."""


def steps(settings: Method, changes: list[float]) -> list[float]:
    """One entry of the shared adapter after each of several rounds.

    Both clients of a round send the shared adapter plus that round's change in every entry.
    """
    federation = context([2, 2], [10, 30])
    algorithm = settings.for_federation(federation)
    state, found = started(algorithm, federation), []
    for number, change in enumerate(changes, start=1):
        sent: Adapter = {
            name: tensor + change
            for name, tensor in algorithm.adapter_for(state, "client-0").items()
        }
        state = algorithm.combine(
            state, replies(federation, dict.fromkeys(names(2), sent), number)
        ).state
        found.append(float(algorithm.adapter_for(state, "client-0")[NAME][0, 0]))
    return found


def test_momentum_0_and_rate_1_is_fedavg_bit_for_bit() -> None:
    federation = context([3, 3, 3], [10, 30, 20])
    ends = []
    for settings in (FedOpt(server_optimizer="momentum", server_momentum=0), FedAvg()):
        algorithm = settings.for_federation(federation)
        state = started(algorithm, federation)
        for number in (1, 2, 3):
            centres = {c: lora(3, 7 * number + i) for i, c in enumerate(names(3))}
            state, _ = play(algorithm, federation, state, centres, number)
        ends.append(digest(algorithm.adapter_for(state, "client-0")))
    assert ends[0] == ends[1]


def test_the_change_is_that_of_the_mean_by_rows() -> None:
    """With 10 and 30 rows and changes of 1 and 3 it is 2.5; a first step of rate 0.5 goes there."""
    federation = context([2, 2], [10, 30])
    algorithm = FedOpt(
        server_optimizer="momentum", server_momentum=0.2, server_rate=0.5
    ).for_federation(federation)
    state = started(algorithm, federation)
    begun = algorithm.adapter_for(state, "client-0")
    sent = {
        client: {name: tensor + change for name, tensor in begun.items()}
        for client, change in (("client-0", 1.0), ("client-1", 3.0))
    }
    after = algorithm.adapter_for(algorithm.combine(state, replies(federation, sent)).state, "")
    for name, tensor in begun.items():
        torch.testing.assert_close(after[name], tensor + 0.5 * 0.8 * 2.5)


def test_momentum_by_hand() -> None:
    """Of m = beta m + (1 - beta) D with beta = 0.5 and D = 1, 0, 2: m = 0.5, 0.25, 1.125."""
    found = steps(
        FedOpt(server_optimizer="momentum", server_momentum=0.5, server_rate=2.0), [1.0, 0.0, 2.0]
    )
    assert found == pytest.approx([1.0, 1.5, 3.75])


def test_momentum_with_the_rate_that_is_not_set_is_fedavgm_as_published() -> None:
    """Of m = beta m + D and w = w + m with beta = 0.5 and D = 1, 0, 2: m = 1, 0.5, 2.25."""
    found = steps(FedOpt(server_optimizer="momentum", server_momentum=0.5), [1.0, 0.0, 2.0])
    assert found == pytest.approx([1.0, 1.5, 3.75])


@pytest.mark.parametrize("change", [0.3, -0.02, 1e-5])
def test_the_first_step_of_adam_in_closed_form(change: float) -> None:
    """From m = 0.1 D and v = 0.99 tau^2 + 0.01 D^2, as m = 0 and v = tau^2 before."""
    (found,) = steps(FedOpt(server_rate=0.05, server_floor=0.01), [change])
    v = 0.99 * 0.01**2 + 0.01 * change**2
    assert found == pytest.approx(0.05 * 0.1 * change / (math.sqrt(v) + 0.01), rel=1e-5)


def test_the_first_step_of_yogi_and_adagrad_in_closed_form() -> None:
    """Yogi's v moves by 0.01 D^2 towards D^2, which is above tau^2 here; Adagrad's by all of it."""
    change, tau = 0.3, 0.01
    for name, v in (
        ("yogi", tau**2 + 0.01 * change**2),
        ("adagrad", tau**2 + change**2),
    ):
        (found,) = steps(
            FedOpt(server_optimizer=name, server_rate=0.05, server_floor=tau), [change]
        )
        assert found == pytest.approx(0.05 * 0.1 * change / (math.sqrt(v) + tau), rel=1e-5)


@pytest.mark.parametrize("name", ["adam", "yogi", "adagrad"])
def test_later_steps_follow_the_recursions(name: str) -> None:
    changes, tau, rate, beta1, beta2 = [0.3, -0.2, 0.001], 0.05, 0.2, 0.6, 0.7
    settings = {} if name == "adagrad" else {"server_memory": beta2}
    found = steps(
        FedOpt(
            server_optimizer=name,
            server_rate=rate,
            server_floor=tau,
            server_momentum=beta1,
            **settings,
        ),
        changes,
    )
    m, v, w = 0.0, tau**2, 0.0
    for change, value in zip(changes, found, strict=True):
        m, square = beta1 * m + (1 - beta1) * change, change**2
        if name == "adam":
            v = beta2 * v + (1 - beta2) * square
        elif name == "yogi":
            v = v + (1 - beta2) * square if square > v else v - (1 - beta2) * square
        else:
            v += square
        w += rate * m / (math.sqrt(v) + tau)
        assert value == pytest.approx(w, rel=1e-4)


def test_without_memory_and_floor_adam_steps_by_signs() -> None:
    """With beta1 = beta2 = 0 and tau far below the changes, w moves by rate * sign(D)."""
    settings = FedOpt(server_rate=0.25, server_momentum=0, server_memory=0, server_floor=1e-9)
    assert steps(settings, [3.0, -0.01, 20.0]) == pytest.approx([0.25, 0.0, 0.25], abs=1e-5)


def test_what_is_not_set_is_the_rate_of_the_optimizer() -> None:
    assert FedOpt(server_optimizer="momentum", server_momentum=0).rate == 1.0
    assert FedOpt().rate == FedOpt(server_optimizer="yogi").rate
    assert FedOpt(server_rate=0.5).rate == 0.5


@pytest.mark.parametrize(
    ("name", "setting"), [("momentum", "server_floor"), ("adagrad", "server_memory")]
)
def test_settings_of_other_server_optimizers_are_refused(name: str, setting: str) -> None:
    chosen = ["algorithm.name=fedopt", f"algorithm.server_optimizer={name}"]
    assert load_config(overrides=chosen).algorithm.name == "fedopt"
    with pytest.raises(
        ConfigError, match=rf"{setting} = 0.1: server_optimizer = '{name}' does not"
    ):
        load_config(overrides=[*chosen, f"algorithm.{setting}=0.1"])


def test_different_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fedopt: client 'client-0' has rank 2"):
        FedOpt().for_federation(context([2, 3]))
