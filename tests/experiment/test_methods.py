"""Whole runs of the methods beside local, fedavg and mira.

What they share, what they freeze, and adapters that plain PEFT loads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from fedmira.experiment import Experiment, build_experiment, run_experiment
from fedmira.model import BaseModel
from fedmira.runs import Result
from small import CLIENTS, adapter_bytes, adapters_of, events_of, make_config, table_of

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


@pytest.mark.parametrize("name", ["ditto", "flexlora"])
def test_kept_moments_that_would_belong_to_another_adapter_are_refused(
    name: str, base_folder: Path, clients_folder: Path
) -> None:
    with pytest.raises(
        ValidationError, match=rf"'kept' does not go with algorithm\.name = '{name}'"
    ):
        make_config(
            base_folder, clients_folder, {"algorithm.name": name, "local.optimizer_state": "kept"}
        )
