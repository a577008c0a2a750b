"""SCAFFOLD: control variates by hand, FedAvg where clients agree, the joint minimum where not."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from fedmira.adapters import Adapter, digest, map_tensors, weighted_sum
from fedmira.config import load_config
from fedmira.errors import ConfigError
from fedmira.messages import Payload, Reply
from fedmira.methods import FedAvg, Method, MethodContext, Scaffold, ServerState, Trained
from lora_federation import context, descend, lora, names, started

STEPS, RATE = 4, 0.2


def played(
    algorithm: Method,
    federation: MethodContext,
    state: ServerState,
    centres: Mapping[str, Adapter],
    memories: dict[str, Payload],
    number: int,
) -> tuple[ServerState, list[Reply]]:
    """One round of clients with losses 1/2 |w - centre|^2, whose memories are kept."""
    sent = []
    for client, centre in centres.items():
        payload, memory = algorithm.instruct(state, client), memories.get(client)
        adapter = descend(algorithm.begin(payload, memory), centre, STEPS, RATE)
        rows = federation.rows[client]
        answer, kept = algorithm.finish(payload, memory, Trained(adapter, rows, STEPS, RATE))
        if kept is not None:
            memories[client] = kept
        sent.append(Reply(client, number, rows, answer))
    return algorithm.combine(state, sent).state, sent


def assert_close(found: Adapter, expected: Adapter, atol: float = 1e-5) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=atol)


def test_the_first_control_variate_is_the_mean_gradient_of_the_round() -> None:
    """Of gradients w_i - centre on the way w_i = centre + (1 - lr)^i (w_0 - centre), by hand."""
    federation = context([2, 2], [10, 30])
    algorithm, memories = Scaffold().for_federation(federation), dict[str, Payload]()
    state, centres = (
        started(algorithm, federation),
        {c: lora(2, 7 + i) for i, c in enumerate(names(2))},
    )
    begun = state.adapters["shared"]
    after, sent = played(algorithm, federation, state, centres, memories, 1)
    share = sum((1 - RATE) ** i for i in range(STEPS)) / STEPS
    gradients = {
        client: map_tensors(lambda w, c: share * (w - c), begun, centre)
        for client, centre in centres.items()
    }
    for reply in sent:
        assert_close(memories[reply.client_id].tensors["control"], gradients[reply.client_id])
        assert_close(reply.payload.tensors["control"], gradients[reply.client_id])
    assert_close(after.adapters["control"], weighted_sum(list(gradients.values()), [0.25, 0.75]))


def test_a_later_round_corrects_by_c_minus_c_k_and_updates_by_option_2() -> None:
    federation = context([2, 2, 2])
    algorithm, memories = Scaffold().for_federation(federation), dict[str, Payload]()
    state, centres = (
        started(algorithm, federation),
        {c: lora(2, 7 + i) for i, c in enumerate(names(3))},
    )
    state, _ = played(algorithm, federation, state, centres, memories, 1)
    own, common = memories["client-1"].tensors["control"], state.adapters["control"]
    begun = algorithm.begin(algorithm.instruct(state, "client-1"), memories["client-1"])
    assert begun.hook is not None
    gradient = lora(2, 30)
    assert_close(
        begun.hook(gradient, begun.adapter),
        map_tensors(lambda g, mine, all_: g - mine + all_, gradient, own, common),
    )
    _, (reply,) = played(
        algorithm, federation, state, {"client-1": centres["client-1"]}, memories, 2
    )
    trained = reply.payload.tensors["adapter"]
    assert_close(
        memories["client-1"].tensors["control"],
        map_tensors(
            lambda mine, all_, w, after: mine - all_ + (w - after) / (STEPS * RATE),
            own,
            common,
            state.adapters["shared"],
            trained,
        ),
    )


def test_the_servers_control_variate_is_the_mean_of_the_clients_by_all_rows() -> None:
    """In rounds of some clients too: what is absent is as it was."""
    federation = context([2] * 3, [10, 30, 20])
    algorithm, memories = Scaffold().for_federation(federation), dict[str, Payload]()
    state, centres = (
        started(algorithm, federation),
        {c: lora(2, 7 + i) for i, c in enumerate(names(3))},
    )
    for number, present in enumerate((names(2), ("client-2",), names(3)[1:], names(1)), start=1):
        chosen = {client: centres[client] for client in present}
        state, _ = played(algorithm, federation, state, chosen, memories, number)
        known = [memories[c].tensors["control"] for c in names(3) if c in memories]
        shares = [federation.rows[c] / 60 for c in names(3) if c in memories]
        assert_close(state.adapters["control"], weighted_sum(known, shares))


def test_equal_clients_are_fedavg() -> None:
    federation = context([3, 3, 3], [10, 30, 20])
    centre, ends = lora(3, 9), []
    for settings in (Scaffold(), FedAvg()):
        algorithm, memories = settings.for_federation(federation), dict[str, Payload]()
        state = started(algorithm, federation)
        for number in (1, 2, 3):
            state, _ = played(
                algorithm, federation, state, dict.fromkeys(names(3), centre), memories, number
            )
        ends.append(algorithm.adapter_for(state, "client-0"))
    assert_close(*ends)


def test_round_1_is_fedavg_bit_for_bit() -> None:
    federation, ends = context([3, 3], [10, 30]), []
    for settings in (Scaffold(), FedAvg()):
        algorithm = settings.for_federation(federation)
        centres = {c: lora(3, 7 + i) for i, c in enumerate(names(2))}
        state = started(algorithm, federation)
        ends.append(played(algorithm, federation, state, centres, {}, 1)[0].adapters["shared"])
    assert digest(ends[0]) == digest(ends[1])


def test_clients_of_unequal_curvature_meet_at_the_joint_minimum_where_fedavg_does_not() -> None:
    """Losses h_k / 2 (w - c_k)^2, equal rows: the minimum of their sum is sum h_k c_k / sum h_k.

    FedAvg's local steps overweigh the flat client: its fixed point is another one.
    """
    curvatures, minima = (4.0, 0.5), (1.0, -1.0)
    joint = sum(h * c for h, c in zip(curvatures, minima, strict=True)) / sum(curvatures)
    federation, ends = context([2, 2]), []
    for settings in (Scaffold(), FedAvg()):
        algorithm, memories = settings.for_federation(federation), dict[str, Payload]()
        state = started(algorithm, federation)
        for number in range(1, 121):
            sent = []
            for client, h, c in zip(names(2), curvatures, minima, strict=True):
                payload, memory = algorithm.instruct(state, client), memories.get(client)
                begun = algorithm.begin(payload, memory)
                w: Adapter = begun.adapter
                for _ in range(STEPS):
                    slope: Adapter = map_tensors(lambda t, h=h, c=c: h * (t - c), w)
                    slope = begun.hook(slope, w) if begun.hook else slope
                    w = map_tensors(lambda t, s: t - 0.1 * s, w, slope)
                answer, kept = algorithm.finish(payload, memory, Trained(w, 20, STEPS, 0.1))
                if kept is not None:
                    memories[client] = kept
                sent.append(Reply(client, number, 20, answer))
            state = algorithm.combine(state, sent).state
        ends.append(float(algorithm.adapter_for(state, "")["m.q_proj.lora_B.weight"][0, 0]))
    assert ends[0] == pytest.approx(joint, abs=1e-4)
    assert abs(ends[1] - joint) > 0.05


def test_adapter_and_control_variate_travel_both_ways_and_the_clients_own_stays() -> None:
    federation = context([2, 2])
    algorithm, memories = Scaffold().for_federation(federation), dict[str, Payload]()
    state = started(algorithm, federation)
    once = Payload({"adapter": state.adapters["shared"]}).num_bytes
    _, sent = played(algorithm, federation, state, {c: lora(2, 7) for c in names(2)}, memories, 1)
    assert algorithm.instruct(state, "client-0").num_bytes == 2 * once
    assert [reply.payload.num_bytes for reply in sent] == [2 * once] * 2
    assert set(memories["client-0"].tensors) == {"control"}


def test_without_a_step_nothing_is_learned_about_the_gradient() -> None:
    federation = context([2, 2])
    algorithm = Scaffold().for_federation(federation)
    payload = algorithm.instruct(started(algorithm, federation), "client-0")
    sent, kept = algorithm.finish(
        payload, Payload({"control": lora(2, 3)}), Trained(payload.tensors["adapter"], 20, 0, RATE)
    )
    assert not any(bool(part.any()) for part in sent.tensors["control"].values())
    assert kept is not None and digest(kept.tensors["control"]) == digest(lora(2, 3))


@pytest.mark.parametrize(
    "setting",
    ["optimizer=adamw", "schedule=cosine", "warmup_steps=3", "lora_plus_ratio=4"],
)
def test_steps_that_hide_their_gradients_are_refused_with_a_remedy(setting: str) -> None:
    plain = ["algorithm.name=scaffold", "local.optimizer=sgd"]
    assert load_config(overrides=plain).algorithm.name == "scaffold"
    key = setting.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"local\.{key} = .* set local\.{key} = "):
        load_config(overrides=[*plain, f"local.{setting}"])


def test_different_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"scaffold: client 'client-0' has rank 2"):
        Scaffold().for_federation(context([2, 3]))
