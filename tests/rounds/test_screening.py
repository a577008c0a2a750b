"""Which replies the server leaves out; honest rounds are as if it were not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmira.adapters import Adapter, product_norm
from fedmira.clients import Clients
from fedmira.config import ServerSettings
from fedmira.experiment import build_experiment, run_experiment
from fedmira.messages import Failure, Payload, Reply, Request
from fedmira.model import BaseModel
from fedmira.rounds import Screen
from small import adapter_bytes, events_of, make_config, with_clients

NAMES = ("ant", "bee", "cat", "dog")


def lora(seed: int, length: float = 1.0, rank: int = 2) -> dict[str, torch.Tensor]:
    """Factors whose product B A has this norm."""
    draw = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, 5, generator=draw), torch.randn(4, rank, generator=draw)
    found = {"m.lora_A.weight": down, "m.lora_B.weight": up}
    return {**found, "m.lora_B.weight": up * (length / product_norm(found))}


def start(rank: int = 2) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    return {
        "m.lora_A.weight": torch.randn(rank, 5, generator=draw),
        "m.lora_B.weight": torch.zeros(4, rank),
    }


def requests(sent: Adapter | None = None) -> list[Request]:
    payload = Payload({"adapter": sent or start()})
    return [Request(name, 3, 0, payload) for name in NAMES]


def replies(adapters: Mapping[str, Adapter], rows: Mapping[str, int] | None = None) -> list[Reply]:
    return [
        Reply(name, 3, (rows or {}).get(name, 10), Payload({"adapter": adapter}))
        for name, adapter in adapters.items()
    ]


def screen(
    rows: Mapping[str, int] | None = None, steps: Mapping[str, int] | None = None, **settings: Any
) -> Screen:
    return Screen(
        ServerSettings(**settings),
        rows or dict.fromkeys(NAMES, 10),
        steps or dict.fromkeys(NAMES, 5),
        dict.fromkeys(NAMES, 2.0),
    )


def test_a_round_of_equal_lengths_is_what_it_was() -> None:
    given = replies({name: lora(i) for i, name in enumerate(NAMES)})
    found = screen()(requests(), given)
    assert all(one is other for one, other in zip(found.replies, given, strict=True))
    assert (found.failures, found.notes) == ([], [])


@pytest.mark.parametrize("length", [100.0, -100.0, 6.0, float("inf"), float("nan")])
def test_an_update_far_longer_than_the_rounds_median_is_left_out(length: float) -> None:
    wild = lora(2)
    wild["m.lora_B.weight"] = wild["m.lora_B.weight"] * length
    adapters = {"ant": lora(0), "bee": lora(1), "cat": wild, "dog": lora(3)}
    found = screen()(requests(), replies(adapters))
    assert [reply.client_id for reply in found.replies] == ["ant", "bee", "dog"]
    (failure,) = found.failures
    assert (failure.client_id, failure.stage, failure.round) == ("cat", "screen", 3)
    assert "server.norm_bound is 5" in failure.reason


def test_factors_that_hide_in_a_small_product_are_left_out_all_the_same() -> None:
    """What averages factors is harmed by A x 1e4, B / 1e4, though the product is the same."""
    hidden = {
        name: tensor * (1e4 if "lora_A" in name else 1e-4) for name, tensor in lora(2).items()
    }
    adapters = {"ant": lora(0), "bee": lora(1), "cat": hidden, "dog": lora(3)}
    (failure,) = screen()(requests(), replies(adapters)).failures
    assert failure.client_id == "cat"
    assert "its 'adapter'" in failure.reason


def test_who_takes_more_steps_may_go_further() -> None:
    adapters = {"ant": lora(0), "bee": lora(1), "cat": lora(2, 30.0), "dog": lora(3)}
    steps = {"ant": 5, "bee": 5, "cat": 50, "dog": 5}
    assert not screen(steps=steps)(requests(), replies(adapters)).failures
    assert screen()(requests(), replies(adapters)).failures


def test_of_two_replies_nobody_can_say_which_one_is_odd() -> None:
    adapters = {"ant": lora(0), "bee": lora(1, 1e6)}
    assert not screen()(requests(), replies(adapters)).failures


def test_more_rows_than_were_declared_are_left_out() -> None:
    adapters = {name: lora(i) for i, name in enumerate(NAMES)}
    found = screen()(requests(), replies(adapters, {"bee": 10**9}))
    assert [failure.client_id for failure in found.failures] == ["bee"]
    assert found.failures[0].reason == "claims 1e+09 training rows, and had 10 before round 1"


def test_rows_out_of_all_proportion_weigh_as_the_median() -> None:
    """Declared, so that nothing contradicts them; 10, 12, 14 and 10^9 have the median 13."""
    rows = {"ant": 10, "bee": 12, "cat": 10**9, "dog": 14}
    adapters = {name: lora(i) for i, name in enumerate(NAMES)}
    found = screen(rows)(requests(), replies(adapters, rows))
    assert [reply.num_examples for reply in found.replies] == [10, 12, 13, 14]
    assert "cat claims 1e+09 training rows" in found.notes[0]
    believing = screen(rows, heaviest=1e9)(requests(), replies(adapters, rows))
    assert [reply.num_examples for reply in believing.replies] == [10, 12, 10**9, 14]


def test_an_update_against_all_others_is_left_out_where_a_cosine_is_set() -> None:
    shared = lora(0)
    opposed = {name: -tensor if "lora_B" in name else tensor for name, tensor in shared.items()}
    adapters = {"ant": shared, "bee": shared, "cat": opposed, "dog": shared}
    zero = {"m.lora_A.weight": shared["m.lora_A.weight"], "m.lora_B.weight": torch.zeros(4, 2)}
    found = screen(least_cosine=-0.5)(requests(zero), replies(adapters))
    assert [failure.client_id for failure in found.failures] == ["cat"]
    assert "a cosine of -1.000 with the others'" in found.failures[0].reason
    assert not screen()(requests(zero), replies(adapters)).failures


def test_without_it_everything_is_believed() -> None:
    adapters = {"ant": lora(0), "bee": lora(1), "cat": lora(2, 1e9), "dog": lora(3)}
    given = replies(adapters, {"bee": 10**9})
    assert screen(screen=False)(requests(), given).replies is given


@dataclass
class Attacked:
    """Real clients, of which one sends something else than it trained."""

    inner: Clients
    attacker: str
    forge: Callable[[Request, Reply], Reply]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def train(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        sent = {request.client_id: request for request in requests}
        return [
            self.forge(sent[answer.client_id], answer)
            if isinstance(answer, Reply) and answer.client_id == self.attacker
            else answer
            for answer in self.inner.train(requests)
        ]


def times_hundred(request: Request, reply: Reply) -> Reply:
    adapter = {
        name: tensor * 100 if "lora_B" in name else tensor
        for name, tensor in reply.payload.tensors["adapter"].items()
    }
    return replace(reply, payload=Payload({"adapter": adapter}))


def lying(request: Request, reply: Reply) -> Reply:
    return replace(reply, num_examples=10**9)


@pytest.mark.parametrize("method", ["fedavg", "flexlora", "mira", "two-level"])
@pytest.mark.parametrize("forge", [times_hundred, lying])
def test_a_run_says_whom_it_left_out_and_what_its_others_get_is_free_of_it(
    method: str,
    forge: Callable[[Request, Reply], Reply],
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
) -> None:
    settings = {"algorithm.name": method, "rounds.count": 2, "evaluation.rouge": False}
    config = make_config(base_folder, clients_folder, settings)
    experiment = build_experiment(config, base)
    attacked = with_clients(experiment, Attacked(experiment.clients, "birch-1", forge))  # type: ignore[arg-type]
    result = run_experiment(attacked, tmp_path / "attacked")
    left_out = [event for event in events_of(result.folder) if event["event"] == "failure"]
    assert [(event["round"], event["client"], event["stage"]) for event in left_out] == [
        (1, "birch-1", "screen"),
        (2, "birch-1", "screen"),
    ]
    told = json.loads((result.folder / "run.json").read_text(encoding="utf-8"))
    assert told["screened"] == {"birch-1": 2}
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "birch-1 in 2 rounds" in page
    silent = build_experiment(config, base)
    silent = with_clients(silent, Attacked(silent.clients, "birch-1", _nothing))  # type: ignore[arg-type]
    run_experiment(silent, tmp_path / "silent")
    assert adapter_bytes(result.folder) == adapter_bytes(tmp_path / "silent")


def _nothing(request: Request, reply: Reply) -> Any:
    return Failure(reply.client_id, reply.round, "train", "the power went out")


def test_lengths_of_sums_of_squares_are_held_against_each_other_by_their_roots() -> None:
    """Gradients 4 times as large have squares 16 times as large: still an honest client."""

    def given(largest: float) -> list[Reply]:
        observed = {"ant": 1.0, "bee": 1.2, "cat": 0.9, "dog": largest}
        return [
            Reply(
                name,
                3,
                10,
                Payload({"adapter": lora(i), "precision": {"A": torch.full((4,), size)}}),
            )
            for i, (name, size) in enumerate(observed.items())
        ]

    plain, squared = screen(), replace(screen(), squared_parts=("precision",))
    assert [failure.client_id for failure in plain(requests(), given(16.0)).failures] == ["dog"]
    assert not squared(requests(), given(16.0)).failures
    (failure,) = squared(requests(), given(50.0)).failures
    assert failure.client_id == "dog" and "'precision' is" in failure.reason


def test_where_clients_begin_elsewhere_what_they_send_is_held_against_each_other() -> None:
    """Three went nowhere from what they were sent, and one was mixed far away: as long as all."""
    adapters = {name: lora(i) for i, name in enumerate(NAMES)}
    asked = [
        Request(name, 3, 0, Payload({"adapter": near}))
        for name, near in {
            **{name: lora(i, length=0.99) for i, name in enumerate(NAMES[:3])},
            "dog": lora(9),
        }.items()
    ]
    plain, mixed = screen(), replace(screen(), begins_elsewhere=True)
    assert [failure.client_id for failure in plain(asked, replies(adapters)).failures] == ["dog"]
    assert not mixed(asked, replies(adapters)).failures
    wild = {**adapters, "cat": lora(2, length=20.0)}
    assert [failure.client_id for failure in mixed(asked, replies(wild)).failures] == ["cat"]
