"""Who takes part: cohort sizes, FedIT's legacy draw, and keyed draws that remember nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fedmira.config import RoundsSettings
from fedmira.model import BaseModel
from fedmira.rounds import cohort_size, sample_clients
from small import make_config, run_loop

TEN = [f"client-{k}" for k in range(10)]


@pytest.mark.parametrize(
    ("clients", "participation", "keyed", "shepherd"),
    [
        (10, 0.25, 3, 2),  # 2.5: half up, or down
        (10, 0.24, 2, 2),
        (10, 0.26, 3, 2),
        (80, 0.1, 8, 8),
        (10, 0.01, 1, 1),  # never nobody
        (7, 1.0, 7, 7),
        (3, 0.5, 2, 1),  # 1.5
    ],
)
def test_the_share_is_rounded_half_up_or_down_as_each_rule_has_it(
    clients: int, participation: float, keyed: int, shepherd: int
) -> None:
    assert cohort_size(clients, RoundsSettings(participation=participation)) == keyed
    assert (
        cohort_size(clients, RoundsSettings(participation=participation, sampling="shepherd"))
        == shepherd
    )


@pytest.mark.parametrize("participation", [0.1, 0.3, 1.0])
def test_shepherd_is_numpys_legacy_choice_seeded_with_the_round_index_from_0(
    participation: float,
) -> None:
    settings = RoundsSettings(participation=participation, sampling="shepherd")
    for round_number in range(1, 21):
        state = np.random.RandomState(round_number - 1)
        expected = sorted(
            f"client-{k}"
            for k in state.choice(np.arange(10), max(1, int(participation * 10)), replace=False)
        )
        assert sample_clients(TEN, settings, 123, round_number) == expected


def test_shepherd_selects_the_same_in_every_run_and_keyed_does_not() -> None:
    shepherd, keyed = (
        RoundsSettings(participation=0.3, sampling=name) for name in ("shepherd", "keyed")
    )
    draws = {seed: [sample_clients(TEN, shepherd, seed, t) for t in range(1, 6)] for seed in (0, 1)}
    assert draws[0] == draws[1]
    draws = {seed: [sample_clients(TEN, keyed, seed, t) for t in range(1, 6)] for seed in (0, 1)}
    assert draws[0] != draws[1]


@pytest.mark.parametrize("sampling", ["keyed", "shepherd"])
def test_a_round_is_drawn_the_same_whatever_was_drawn_before(sampling: str) -> None:
    settings = RoundsSettings(participation=0.3, sampling=sampling)
    seventh_alone = sample_clients(TEN, settings, 5, 7)
    in_turn = [sample_clients(TEN, settings, 5, t) for t in range(1, 8)]
    assert in_turn[-1] == seventh_alone
    assert sample_clients(TEN[::-1], settings, 5, 7) == seventh_alone, (
        "the order in which clients are listed plays no part"
    )


def test_nobody_is_drawn_twice_and_everybody_sooner_or_later() -> None:
    settings = RoundsSettings(participation=0.3)
    counts: Counter[str] = Counter()
    for t in range(1, 201):
        chosen = sample_clients(TEN, settings, 0, t)
        assert chosen == sorted(set(chosen)) and len(chosen) == 3
        counts.update(chosen)
    # 200 draws with probability 0.3: mean 60, standard deviation 6.5; six of them on each side.
    assert set(counts) == set(TEN) and all(abs(count - 60) < 39 for count in counts.values())


def test_the_loop_trains_exactly_the_sampled_clients(
    base: BaseModel, base_folder: object, clients_folder: object
) -> None:
    config = make_config(
        str(base_folder),
        str(clients_folder),
        {"rounds.participation": 0.5, "local.steps": 1, "algorithm.name": "local"},
    )
    experiment, _, outcomes = run_loop(config, base)
    for outcome in outcomes:
        expected = sample_clients(list(experiment.ranks), config.rounds, config.seed, outcome.round)
        assert (
            [reply.client_id for reply in outcome.replies]
            == [request.client_id for request in outcome.requests]
            == expected
        )
    assert len({tuple(reply.client_id for reply in outcome.replies) for outcome in outcomes}) > 1
