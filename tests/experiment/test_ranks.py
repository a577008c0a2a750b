"""Ranks of clients: FlexLoRA's types and shares, draws, and runs with drawn ranks.

A draw depends on seed and client alone.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.config import (
    AdapterSettings,
    dump_config,
    load_config,
    with_overrides,
)
from fedmira.errors import ConfigError
from fedmira.experiment import build_experiment, client_ranks, run_experiment
from fedmira.experiment.ranks import SHARES, draw_type, rank_of_type
from fedmira.model import BaseModel, TargetModule
from small import CLIENTS, events_of, make_config, table_of

TYPES = ("light", "mid", "mixed", "heavy")
DRAWN = ("uniform", "heavy-tail-light", "heavy-tail-strong", "normal")
LLAMA = [
    *(
        TargetModule(f"model.layers.0.self_attn.{name}", 2048, 2048, False)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    ),
    *(
        TargetModule(f"model.layers.0.mlp.{name}", 2048, 5504, False)
        for name in ("gate_proj", "up_proj")
    ),
    TargetModule("model.layers.0.mlp.down_proj", 5504, 2048, False),
]


def names(count: int) -> list[str]:
    return [f"client-{k}" for k in range(count)]


def test_the_shares_are_those_of_the_released_code() -> None:
    assert [SHARES["uniform"][kind] for kind in TYPES] == [0.25] * 4
    assert [SHARES["heavy-tail-light"][kind] for kind in TYPES] == [0.80, 0.05, 0.05, 0.10]
    assert [SHARES["heavy-tail-strong"][kind] for kind in TYPES] == [0.05, 0.05, 0.10, 0.80]
    densities = [NormalDist(1.5, 0.7).pdf(position) for position in range(4)]
    assert [SHARES["normal"][kind] for kind in TYPES] == pytest.approx(
        [density / sum(densities) for density in densities]
    )
    assert all(math.isclose(sum(shares.values()), 1) for shares in SHARES.values())


@pytest.mark.parametrize("distribution", DRAWN)
def test_types_are_as_frequent_as_their_shares(distribution: str) -> None:
    found = Counter(draw_type(distribution, 3, client) for client in names(4000))  # type: ignore[arg-type]
    for kind in TYPES:
        share = SHARES[distribution][kind]  # type: ignore[index]
        assert abs(found[kind] / 4000 - share) < 5 * math.sqrt(share * (1 - share) / 4000)


@settings(deadline=None)
@given(
    st.sets(st.integers(0, 10**6), min_size=1, max_size=30),
    st.integers(0, 5),
    st.randoms(use_true_random=False),
)
def test_a_rank_depends_on_seed_and_client_alone(
    numbers: set[int], seed: int, draw: object
) -> None:
    drawn = AdapterSettings(rank_distribution="normal")
    clients = [f"client-{number}" for number in numbers]
    together = client_ranks(drawn, clients, LLAMA, seed)
    shuffled = list(clients)
    draw.shuffle(shuffled)  # type: ignore[attr-defined]
    assert client_ranks(drawn, shuffled, LLAMA, seed) == together
    assert {
        client: client_ranks(drawn, [client], LLAMA, seed)[client] for client in clients
    } == together


def test_another_seed_draws_other_types() -> None:
    drawn = AdapterSettings(rank_distribution="uniform")
    assert client_ranks(drawn, names(50), LLAMA, 0) != client_ranks(drawn, names(50), LLAMA, 1)


def test_the_types_have_flexloras_ranks() -> None:
    assert [rank_of_type(kind, (8, 30, 200), LLAMA[:4]) for kind in TYPES] == [8, 30, 30, 200]  # type: ignore[arg-type]
    assert [rank_of_type(kind, (8, 30, 200), LLAMA[4:]) for kind in TYPES] == [8, 30, 200, 200]  # type: ignore[arg-type]
    meant = 30 * 4 * (2048 + 2048) + 200 * 3 * (2048 + 5504)
    per_rank = 4 * (2048 + 2048) + 3 * (2048 + 5504)
    rank = rank_of_type("mixed", (8, 30, 200), LLAMA)
    assert rank == 129 and abs(rank * per_rank - meant) <= per_rank / 2


def test_a_list_comes_before_a_type_and_a_type_before_the_draw() -> None:
    given_ranks = AdapterSettings(
        rank_distribution="heavy-tail-strong",
        type_ranks=(2, 4, 16),
        rank_types={"client-0": "light", "client-1": "mid"},
        ranks={"client-2": 5},
    )
    found = client_ranks(given_ranks, names(60), LLAMA[:4], 0)
    assert (found["client-0"], found["client-1"], found["client-2"]) == (2, 4, 5)
    assert set(list(found.values())[3:]) == {2, 4, 16}
    assert client_ranks(
        AdapterSettings(rank=7, rank_types={"client-1": "heavy"}), names(3), LLAMA, 0
    ) == {
        "client-0": 7,
        "client-1": 200,
        "client-2": 7,
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["adapter.rank=8", "adapter.rank_distribution=uniform"],
            "rank is 8, but rank_distribution = 'uniform' draws the ranks",
        ),
        (["adapter.type_ranks=[30, 8, 200]"], r"type_ranks is \[30, 8, 200\]; must rise"),
        (
            ["adapter.rank_types.a=heavy", "adapter.ranks.a=4"],
            "client 'a' has a rank in ranks and a type in rank_types",
        ),
        (
            ["adapter.rank_types.a=huge"],
            'adapter.rank_types.a = "huge": must be one of light, mid, mixed, heavy',
        ),
    ],
)
def test_contradictions_are_errors(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=overrides)


def test_unknown_clients_are_named_with_the_key() -> None:
    wrong = AdapterSettings(ranks={"nobody": 4}, rank_types={"stranger": "mid"})
    with pytest.raises(ConfigError) as caught:
        client_ranks(wrong, names(2), LLAMA, 0)
    assert list(caught.value.problems) == [
        "adapter.ranks: there is no client 'nobody'; the clients are client-0, client-1",
        "adapter.rank_types: there is no client 'stranger'; the clients are client-0, client-1",
    ]


def test_a_distribution_covers_the_rank_of_a_preset_and_survives_the_file(tmp_path: Path) -> None:
    config = load_config(preset="mira-paper-ni", overrides=["adapter.rank_distribution=normal"])
    assert config.adapter.rank_distribution == "normal"
    (tmp_path / "config.toml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "config.toml") == config


@pytest.mark.parametrize("algorithm", ["flexlora", "hetlora", "mira"])
def test_drawn_ranks_train_and_travel(
    algorithm: str, base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    fixed = make_config(
        base_folder,
        clients_folder,
        {"graph.kind": "category", "rounds.count": 2, "algorithm.name": algorithm, "seed": 4},
    )
    drawn = with_overrides(
        fixed, ["adapter.rank_distribution=uniform", "adapter.type_ranks=[1, 2, 6]"]
    )
    experiment = build_experiment(drawn, base)
    expected = client_ranks(drawn.adapter, sorted(CLIENTS), experiment.targets, 4)
    assert experiment.ranks == expected and len(set(expected.values())) > 1
    folder = run_experiment(experiment, tmp_path / "run").folder
    assert {row["client"]: int(row["rank"]) for row in table_of(folder, "clients")} == expected
    per_rank = 2 * ((32 + 32) + (32 + 16))  # q_proj and v_proj of two layers
    for event in events_of(folder, "train"):
        assert event["bytes_up"] == event["bytes_down"] == 4 * per_rank * expected[event["client"]]


def test_a_method_for_one_rank_refuses_drawn_ranks(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    fixed = make_config(base_folder, clients_folder, {"algorithm.name": "fedavg"})
    config = with_overrides(
        fixed, ["adapter.rank_distribution=uniform", "adapter.type_ranks=[1, 2, 6]"]
    )
    with pytest.raises(
        ConfigError, match="needs one rank \\(set adapter.rank_distribution to 'one'"
    ):
        build_experiment(config, base)
