"""What the plan says of traffic, against what a run then counts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fedmira.experiment import build_experiment, run_experiment
from fedmira.model import BaseModel
from fedmira.studies import make_plan
from small import events_of, make_config

PER_RANK = 2 * ((32 + 32) + (32 + 16))  # q_proj 32 to 32 and v_proj 32 to 16 in two layers


@pytest.mark.parametrize(
    ("settings", "down", "up"),
    [
        ({"algorithm.name": "fedavg"}, 4 * 4 * PER_RANK, 4 * 4 * PER_RANK),
        (
            {"algorithm.name": "fedkseed", "local.optimizer": "zeroth-order"},
            0,
            2 * (4 + 4),
        ),  # two steps: a seed and a number each
        (
            {"algorithm.name": "share-factor"},
            4 * 4 * 2 * (32 + 32),
            4 * 4 * 2 * (32 + 32),
        ),  # A of q_proj and v_proj in two layers
    ],
)
def test_planned_traffic_is_that_of_the_first_round(
    settings: dict[str, object],
    down: int,
    up: int,
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
) -> None:
    experiment = build_experiment(
        make_config(base_folder, clients_folder, {**settings, "rounds.count": 1}), base
    )
    plan = make_plan(experiment)
    assert (round(plan.download_mib * 2**20), round(plan.upload_mib * 2**20)) == (down, up)
    folder = run_experiment(experiment, tmp_path / "run").folder
    for event in events_of(folder, "train"):
        assert (event["bytes_down"], event["bytes_up"]) == (down, up)
        kinds = {
            kind for way in ("down", "up") for kind in event[f"dtype_{way}"].split("+") if kind
        }
        assert "+".join(sorted(kinds)) == plan.dtype


@pytest.mark.parametrize(
    "settings",
    [
        {"engine.wire": "int8", "rounds.participation": 0.5},
        {"engine.wire": "float16", "algorithm.name": "flexlora", "adapter.ranks": {"apple-1": 8}},
        {"algorithm.name": "fedfomo", "algorithm.candidates": 2, "rounds.participation": 0.6},
        {"algorithm.name": "fedfomo"},
        {"algorithm.name": "fedex"},
        {"algorithm.name": "flora", "adapter.ranks": {"apple-1": 8}, "rounds.participation": 0.6},
        {"algorithm.name": "scaffold", "local.optimizer": "sgd", "engine.wire": "int8"},
        {"algorithm.name": "fedlease", "engine.wire": "float16", "rounds.participation": 0.6},
        {"algorithm.name": "fedalt", "rounds.participation": 0.5},
        {
            "algorithm.name": "fedalt",
            "algorithm.rest_space": "factor",
            "algorithm.learned_share": True,
            "graph.kind": "uniform",
        },
        {"algorithm.name": "lora-fair"},
        {"algorithm.name": "fola"},
        {"algorithm.name": "cgc-lora", "algorithm.common_experts": 2},
        {"algorithm.name": "mtlora"},
        {"algorithm.name": "mtlora", "algorithm.own_coupling": 1.0},
        {"algorithm.name": "feddpa", "algorithm.halves": "together"},
        {"algorithm.name": "feddpa", "rounds.count": 2},
        {"algorithm.name": "rolora", "rounds.count": 2},
        {"algorithm.name": "share-factor"},
        {"algorithm.name": "fedit-finetune", "rounds.count": 2},
        {"algorithm.name": "ditto", "rounds.count": 2},
        {"algorithm.name": "local", "rounds.count": 1},
    ],
    ids=str,
)
def test_planned_traffic_is_that_of_the_whole_run(
    settings: dict[str, object],
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
) -> None:
    experiment = build_experiment(
        make_config(base_folder, clients_folder, {"rounds.count": 4, **settings}), base
    )
    plan = make_plan(experiment)
    times: Counter[str] = Counter()
    total, first, later = Counter[str](), Counter[str](), Counter[str]()
    for event in events_of(run_experiment(experiment, tmp_path / "run").folder, "train"):
        of_this = first if times[event["client"]] == 0 else later
        times[event["client"]] += 1
        for way in ("bytes_down", "bytes_up"):
            total[way] += event[way]
            of_this[way] = max(of_this[way], event[way])
    assert plan.run_unknown == ""
    for way, name in (("bytes_down", "download_mib"), ("bytes_up", "upload_mib")):
        figures = [getattr(plan, f"{part}{name}") for part in ("", "later_", "run_")]
        assert [round((figure or 0) * 2**20) for figure in figures] == [
            first[way],
            later[way],
            total[way],
        ]


@pytest.mark.parametrize(
    ("settings", "later", "why"),
    [
        (
            {"algorithm.name": "fedit-finetune"},
            (1, 1),
            "what travels changes in the course of the run",
        ),
        (
            {"algorithm.name": "fedit-finetune", "rounds.count": 2, "rounds.participation": 0.5},
            (1, 0),
            "changes in the course",
        ),
        (
            {"algorithm.name": "gossip", "graph.kind": "category"},
            None,
            "how many neighbours a client has",
        ),
        ({"algorithm.name": "ditto"}, (1, 0), "changes in the course"),
        ({"algorithm.name": "feddpa"}, (1 / 2, 0), "changes in the course"),
        (
            {"algorithm.name": "rolora"},
            (2 * (32 + 16) / PER_RANK, 2 * (32 + 32) / PER_RANK),
            "changes in the course",
        ),  # B, which the first round averaged, down, and A up
        (
            {"algorithm.name": "fedfomo", "rounds.participation": 0.4},
            (1, 1),
            "changes in the course",
        ),  # one other after round 1, then more
        (
            {"algorithm.name": "fedkseed", "local.optimizer": "zeroth-order"},
            None,
            "depends on the directions that training draws",
        ),
        (
            {"algorithm.name": "fedkseed", "local.optimizer": "zeroth-order", "rounds.count": 1},
            None,
            "depends on the directions",
        ),
    ],
    ids=str,
)
def test_a_total_that_nobody_knows_yet_is_not_told_and_the_reason_is(
    settings: dict[str, object],
    later: tuple[float, float] | None,
    why: str,
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
) -> None:
    """Later rounds in whole adapters, down and up."""
    plan = make_plan(
        build_experiment(
            make_config(base_folder, clients_folder, {"rounds.count": 5, **settings}), base
        )
    )
    assert plan.run_download_mib is plan.run_upload_mib is None and why in plan.run_unknown
    assert any(
        line.startswith("travels in all rounds: not known before training") and why in line
        for line in plan.lines()
    )
    if later is None:
        assert plan.later_download_mib is plan.later_upload_mib is plan.later_dtype is None
    else:
        whole = 4 * 4 * PER_RANK / 2**20
        found = (plan.later_download_mib, plan.later_upload_mib)
        assert found == pytest.approx(
            (later[0] * whole, later[1] * whole), abs=8 / 2**20
        )  # some send a number beside it


def test_the_plan_tells_the_first_message_from_later_ones(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    """int8: the first message down is whole.

    Later ones are a byte a parameter and a float32 for each row of A and column of B.
    """
    plan = make_plan(
        build_experiment(make_config(base_folder, clients_folder, {"engine.wire": "int8"}), base)
    )
    change = (4 * PER_RANK + 4 * 2 * 4 * 4) / 2**20  # four modules of rank 4
    assert (plan.download_mib, plan.upload_mib, plan.dtype) == (
        4 * 4 * PER_RANK / 2**20,
        change,
        "float32+int8",
    )
    assert (plan.later_download_mib, plan.later_upload_mib, plan.later_dtype) == (
        change,
        change,
        "float32+int8",
    )
    text = "\n".join(plan.lines())
    assert (
        "travels in a client's first round: " in text
        and "in each later one: " in text
        and "travels in all rounds: " in text
    )
