"""Whole runs of the methods beside local, fedavg and mira.

What they share, what they freeze, and adapters that plain PEFT loads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from fedmira.adapters import digest
from fedmira.clients import OverWire
from fedmira.experiment import Experiment, build_experiment, run_experiment
from fedmira.model import BaseModel
from fedmira.runs import Result
from small import (
    CLIENTS,
    adapter_bytes,
    adapters_of,
    events_of,
    local_of,
    make_config,
    table_of,
    with_clients,
)

Run = Callable[..., tuple[Experiment, Result]]

METHODS: dict[str, dict[str, Any]] = {
    "fedit-finetune": {},
    "fedprox": {},
    "ditto": {},
    "share-factor": {},
    "flexlora": {"adapter.ranks": {"apple-1": 2, "birch-2": 6}},
    "hetlora": {"adapter.ranks": {"apple-1": 2, "birch-2": 6}},
    "fedex": {},
    "flora": {"adapter.ranks": {"apple-1": 6, "birch-2": 3}},
    "fedrot": {},
    "fedopt": {},
    "scaffold": {"local.optimizer": "sgd", "local.learning_rate": 1.0},
    "fedlease": {},
    "fedalt": {"graph.kind": "category", "adapter.ranks": {"apple-1": 6}},
    "feddpa": {},
    "fola": {},
    "cgc-lora": {"algorithm.common_experts": 2},
    "mtlora": {},
    "gossip": {"graph.kind": "category", "adapter.ranks": {"apple-1": 6}},
    "lora-fair": {},
    "rolora": {},
    "two-level": {"graph.kind": "category", "adapter.ranks": {"apple-1": 6, "birch-2": 2}},
}


@pytest.fixture(scope="module")
def run(
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """Runs in a new folder; the same settings are run once."""
    done: dict[str, tuple[Experiment, Result]] = {}

    def once(name: str, **settings: Any) -> tuple[Experiment, Result]:
        keys = {
            "algorithm.name": name,
            **METHODS.get(name, {}),
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        if repr(keys) not in done:
            experiment = build_experiment(make_config(base_folder, clients_folder, keys), base)
            done[repr(keys)] = (
                experiment,
                run_experiment(experiment, tmp_path_factory.mktemp("runs") / "run"),
            )
        return done[repr(keys)]

    return once


@pytest.mark.parametrize("name", METHODS)
def test_a_run_ends_below_the_base_with_adapters_that_plain_peft_loads_to_the_reported_loss(
    name: str, run: Run, base_folder: Path
) -> None:
    experiment, result = run(name, local__steps=6)
    rows = {row["client"]: row for row in table_of(result.folder, "clients")}
    assert result.summary["after_align_loss"]["mean"] < result.summary["base_loss"]["mean"]
    assert {client: int(row["rank"]) for client, row in rows.items()} == dict(experiment.ranks)
    for client in ("apple-1", "birch-2"):
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32),
            result.folder / "adapters" / client,
        ).eval()
        total, tokens = 0.0, 0
        for row in experiment.clients.data[client].test:
            ids = torch.tensor([[*row.prompt, *row.response]])
            labels = ids.clone()
            labels[:, : len(row.prompt)] = -100
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=labels).loss) * len(row.response)
            tokens += len(row.response)
        assert total / tokens == pytest.approx(float(rows[client]["after_align_loss"]), rel=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_steps_of_local_training(name: str, run: Run) -> None:
    steps = [
        {
            (event["round"], event["client"]): event["steps"]
            for event in events_of(run(each)[1].folder, "train")
        }
        for each in (name, "local")
    ]
    assert steps[0] == steps[1]


def test_fedprox_without_a_pull_is_fedavg_bit_for_bit_and_with_one_stays_nearer_to_what_was_sent(
    run: Run,
) -> None:
    free, average = run("fedprox", algorithm__proximal=0.0)[1], run("fedavg")[1]
    assert adapter_bytes(free.folder, cards=False) == adapter_bytes(average.folder, cards=False)
    lengths = []
    for pull in (0.0, 100.0):
        _, result = run("fedprox", algorithm__proximal=pull, rounds__count=1, local__steps=8)
        lengths.append(
            float(
                sum(
                    (array**2).sum()
                    for name, array in adapters_of(result.folder)["apple-1"].items()
                    if "lora_B" in name
                )
            )
        )
    assert lengths[1] < 0.8 * lengths[0]


def test_ffa_leaves_a_at_the_start_bit_for_bit_even_with_weight_decay(run: Run) -> None:
    frozen = {
        "algorithm__shared_factor": "B",
        "algorithm__private_factor": "frozen",
        "local__weight_decay": 0.1,
    }
    experiment, result = run("share-factor", **frozen)
    for client, adapter in result.adapters.items():
        for name, tensor in adapter.items():
            assert torch.equal(tensor, experiment.starts[client][name]) == (".lora_A." in name)


@pytest.mark.parametrize(("factor", "other"), [("A", "B"), ("B", "A")])
def test_sharing_a_factor_gives_all_clients_that_one_and_counts_nothing_else(
    factor: str, other: str, run: Run
) -> None:
    experiment, result = run("share-factor", algorithm__shared_factor=factor)
    adapters = adapters_of(result.folder)
    first, last = adapters["apple-1"], adapters["birch-2"]
    assert all(
        np.array_equal(first[name], last[name]) for name in first if f"lora_{factor}" in name
    )
    assert not any(
        np.array_equal(first[name], last[name]) for name in first if f"lora_{other}" in name
    )
    size = 4 * sum(
        tensor.numel()
        for name, tensor in experiment.starts["apple-1"].items()
        if f"lora_{factor}" in name
    )
    for event in events_of(result.folder, "train"):
        assert (event["bytes_up"], event["bytes_down"]) == (size, size)


def test_fedalt_keeps_the_rest_of_the_world_still_within_a_round(run: Run) -> None:
    """Rank 4 trains two directions.

    In round 1 the other two are those of the start, and later they are not zero.
    """
    _, first = run("fedalt", rounds__count=1, local__weight_decay=0.1)
    experiment, later = run("fedalt", local__weight_decay=0.1)
    for client in set(CLIENTS) - {"apple-1"}:
        for name, tensor in first.adapters[client].items():
            begun, rest = experiment.starts[client][name], slice(2, 4)
            assert (
                torch.equal(tensor[rest], begun[rest])
                if "lora_A" in name
                else not bool(tensor[:, rest].any())
            )
        assert any(
            bool(tensor[:, 2:4].any())
            for name, tensor in later.adapters[client].items()
            if "lora_B" in name
        )


def test_fedalt_of_factors_with_a_learned_share_holds_parts_whose_shares_sum_to_one(
    run: Run,
) -> None:
    """The variant of the paper, as far as one adapter holds it, with weight decay on everything."""
    settings = {
        "graph__kind": "uniform",
        "adapter__ranks": {},
        "algorithm__rest_space": "factor",
        "algorithm__learned_share": True,
        "local__weight_decay": 0.1,
    }
    _, early = run("fedalt", rounds__count=1, **settings)
    _, late = run("fedalt", rounds__count=2, **settings)
    own = {
        client: {
            name: tensor[:2] if "lora_A" in name else tensor[:, :2] / 0.5
            for name, tensor in adapter.items()
        }
        for client, adapter in early.adapters.items()
    }
    for event in events_of(late.folder, "align"):
        share = event["own_share"]
        assert share == 0.5 if event["round"] == 1 else 0 < abs(share - 0.5) < 0.1
        if event["round"] == 2:
            others = [part for client, part in own.items() if client != event["client"]]
            for name, tensor in late.adapters[event["client"]].items():
                mean = torch.stack([part[name].double() for part in others]).mean(dim=0)
                rest = tensor[2:] if "lora_A" in name else tensor[:, 2:]
                expected = mean if "lora_A" in name else (1 - share) * mean
                torch.testing.assert_close(rest.double(), expected, rtol=1e-5, atol=1e-8)


def test_rolora_leaves_a_at_the_start_in_its_first_round_even_with_weight_decay(run: Run) -> None:
    decay = {"local__weight_decay": 0.1}
    for count, moved in ((1, {"A": False, "B": True}), (2, {"A": True, "B": True})):
        experiment, result = run("rolora", rounds__count=count, **decay)
        for name, tensor in result.adapters["apple-1"].items():
            which = "A" if ".lora_A." in name else "B"
            begun = experiment.starts["apple-1"][name]
            assert torch.equal(tensor, begun) == (not moved[which])
        assert len({digest(adapter) for adapter in result.adapters.values()}) == 1


def test_feddpa_ends_with_one_global_half_and_a_personal_one_for_each(run: Run) -> None:
    _, result = run("feddpa", rounds__count=2)
    halves = [
        {
            digest(
                {
                    name: tensor[part] if "lora_A" in name else tensor[:, part]
                    for name, tensor in adapter.items()
                }
            )
            for adapter in result.adapters.values()
        }
        for part in (slice(0, 2), slice(2, 4))
    ]
    assert [len(half) for half in halves] == [1, len(CLIENTS)]


def test_gossip_ends_as_mira_on_the_same_graph_and_says_what_went_along_an_edge(run: Run) -> None:
    """Two categories of clients; in round 2 and 3 each is sent what its neighbours trained."""
    settings = {"graph__kind": "category", "rounds__count": 3, "adapter__ranks": {}}
    _, gossip = run("gossip", **settings)
    _, mira = run("mira", **settings)
    for client, adapter in gossip.adapters.items():
        assert digest(adapter) == digest(mira.adapters[client])
    told = json.loads((gossip.folder / "run.json").read_text())["method"]
    edges = len(json.loads((gossip.folder / "graph.json").read_text())["edges"])
    size = 4 * sum(tensor.numel() for tensor in next(iter(gossip.adapters.values())).values())
    assert told == {
        "edges": edges,
        "messages_passed_on": 2 * 2 * edges,
        "bytes_passed_on": 2 * 2 * edges * size,
        "bytes_per_edge": 2 * 2 * size,
    }
    passed = sum(event["bytes_passed_on"] for event in events_of(gossip.folder, "round"))
    assert passed == told["bytes_passed_on"]
    assert "Passed on along an edge" in (gossip.folder / "report.html").read_text()
    assert "method" not in json.loads((mira.folder / "run.json").read_text())
    assert "Passed on along an edge" not in (mira.folder / "report.html").read_text()


def test_mtlora_is_fedavg_where_all_is_shared_local_where_nothing_is_and_mira_where_own_parts_align(
    run: Run,
) -> None:
    def ends_as(other: str, **settings: Any) -> bool:
        found, expected = (
            {client: digest(adapter) for client, adapter in result.adapters.items()}
            for _, result in (run("mtlora", **settings), run(other))
        )
        return found == expected

    assert ends_as("fedavg", algorithm__shared_rank=4)
    assert ends_as("local", algorithm__shared_rank=0)
    assert ends_as("mira", algorithm__shared_rank=0, algorithm__own_coupling=1.0)
    assert not ends_as("local") and not ends_as("fedavg")


@pytest.mark.parametrize(
    "keys",
    [
        {"algorithm.name": "feddpa"},
        {"algorithm.name": "fola"},
        {"algorithm.name": "cgc-lora", "algorithm.common_experts": 2},
        {"algorithm.name": "gossip", "graph.kind": "category"},
        {"algorithm.name": "mtlora", "algorithm.own_coupling": 0.5},
        {"algorithm.name": "rolora"},
        {"algorithm.name": "lora-fair"},
        {
            "algorithm.name": "fedalt",
            "algorithm.rest_space": "factor",
            "algorithm.learned_share": True,
            "graph.kind": "uniform",
        },
    ],
    ids=lambda keys: keys["algorithm.name"],
)
def test_a_run_over_messages_ends_in_the_adapters_of_the_run_in_one_process(
    keys: dict[str, Any], base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    """What the client half needs is in the payload, and all of it can be written and read."""
    settings = {**keys, "rounds.participation": 0.6, "rounds.count": 3}
    experiment = build_experiment(make_config(base_folder, clients_folder, settings), base)
    run_experiment(experiment, tmp_path / "here")
    apart = with_clients(experiment, OverWire(local_of(experiment), "float32"))
    run_experiment(apart, tmp_path / "apart")
    found, expected = (adapter_bytes(tmp_path / name, cards=False) for name in ("apart", "here"))
    assert found == expected and found


@pytest.mark.parametrize("name", ["ditto", "flexlora", "feddpa", "rolora"])
def test_kept_moments_that_would_belong_to_another_adapter_are_refused(
    name: str, base_folder: Path, clients_folder: Path
) -> None:
    with pytest.raises(
        ValidationError, match=rf"'kept' does not go with algorithm\.name = '{name}'"
    ):
        make_config(
            base_folder, clients_folder, {"algorithm.name": name, "local.optimizer_state": "kept"}
        )
