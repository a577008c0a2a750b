"""What a newcomer starts from: weights by losses and their errors, and sums of products."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmira.adapters import modules
from fedmira.errors import RunError
from fedmira.fleet import RULES, SHARED, Pool, Trial, best_way
from fedmira.fleet.starts import FEW, scored

LAYER = SimpleNamespace(name="layer", inputs=7, outputs=5)


def drawn(seed: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.lora_A.weight": torch.randn(rank, LAYER.inputs, generator=generator),
        "layer.lora_B.weight": torch.randn(LAYER.outputs, rank, generator=generator),
    }


def product(adapter: dict[str, torch.Tensor]) -> torch.Tensor:
    ((down, up),) = modules(adapter).values()
    return up.double() @ down.double()


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Adapters of ranks 3 and 2 with scales of their own, and a newcomer of rank 2."""
    fresh = drawn(9, 2)
    fresh["layer.lora_B.weight"].zero_()
    adapters = {"a": drawn(1, 3), "b": drawn(2, 2), "c": drawn(3, 2), "d": drawn(4, 2)}
    scales = {"a": 2.0, "b": 0.5, "c": 1.0, "d": 1.0}
    return Pool(adapters, scales, generalist=drawn(5, 2), fresh=fresh, rank=2, scale=4.0)


@given(
    st.lists(st.tuples(*[st.floats(0.1, 9) for _ in range(5)]), min_size=3, max_size=9),
)
def test_weights_fall_by_standard_errors(rows: list[tuple[float, ...]]) -> None:
    losses = {name: [row[i] for row in rows] for i, name in enumerate("abcd")}
    losses[SHARED] = [row[4] for row in rows]
    scores = scored(losses, [1] * len(rows), range(len(rows)))
    assert [score.loss for score in scores] == sorted(score.loss for score in scores)
    made = Pool({}, {}, {}, {}, 1, 1.0).weights("mix", scores)
    assert sum(made.values()) == pytest.approx(1, abs=2e-3 * FEW) and len(made) <= FEW
    best = scores[0]
    assert set(made) <= {score.name for score in scores[:FEW]}
    for score in scores[1:FEW]:
        behind = [losses[score.name][i] - losses[best.name][i] for i in range(len(rows))]
        mean = sum(behind) / len(rows)
        squares = sum((each - mean) ** 2 for each in behind)
        error = math.sqrt(squares / (len(rows) * (len(rows) - 1)))
        if score.name in made and error > 1e-6:
            assert made[score.name] / made[best.name] == pytest.approx(
                math.exp(-mean / error), rel=1e-3, abs=1e-6
            )


def test_only_the_rows_that_count_score() -> None:
    losses = {"a": [1.0, 1.0, 9.0], "b": [2.0, 2.0, 0.0]}
    assert [score.name for score in scored(losses, [1, 1, 1], [0, 1])] == ["a", "b"]
    assert [score.name for score in scored(losses, [1, 1, 1], [0, 1, 2])] == ["b", "a"]
    heavy = scored(losses, [1, 1, 100], [0, 1])
    assert heavy[0].loss == pytest.approx(1.0), "tokens of other rows do not count"


def test_a_start_is_the_sum_of_products_cut_to_the_newcomers_rank(pool: Pool) -> None:
    weights = {"a": 0.5, "b": 0.3, SHARED: 0.2}
    wanted = (
        0.5 * 2.0 * product(pool.adapters["a"])
        + 0.3 * 0.5 * product(pool.adapters["b"])
        + 0.2 * 4.0 * product(pool.generalist)
    )
    left, values, right = torch.linalg.svd(wanted)
    cut = left[:, :2] * values[:2] @ right[:2]
    assert torch.allclose(4.0 * product(pool.start(weights)), cut, atol=1e-5)


def test_one_adapter_of_the_same_rank_is_taken_whole(pool: Pool) -> None:
    for name in ("b", "c"):
        made = pool.start({name: 1.0})
        assert torch.allclose(
            4.0 * product(made), pool.scales[name] * product(pool.adapters[name]), atol=1e-5
        )
    assert pool.start({}) is pool.fresh and pool.start({SHARED: 1.0}) is pool.generalist


def test_ways_name_who_is_in_them(pool: Pool) -> None:
    losses = {"a": [3.0, 3.1], "b": [1.0, 1.2], SHARED: [0.5, 0.4], "c": [math.inf, 1.0]}
    scores = scored(losses, [1, 1], range(2))
    assert scores[-1].name == "c", "what is not finite comes last"
    assert pool.weights("nearest", scores) == {"b": 1.0}
    assert pool.weights("generalist", scores) == {SHARED: 1.0}
    assert pool.weights("fresh", scores) == {}
    assert "c" not in pool.weights("mix", scores)
    nothing = scored({"c": [math.inf] * 2}, [1, 1], range(2))
    assert all(pool.weights(rule, nothing) == {} for rule in RULES)


def trial(rule: str, before: list[float], after: list[float]) -> Trial:
    rows = len(before)
    return Trial(rule, sum(before) / rows, sum(after) / rows, tuple(before), tuple(after))


@pytest.mark.parametrize(
    ("mix", "fresh", "wanted"),
    [
        (([2.0, 2.2, 1.8], [1.0, 1.2, 1.1]), ([3.0] * 3, [1.5] * 3), ("mix", True)),
        (([2.0, 2.2, 1.8], [1.6, 1.6, 1.6]), ([3.0] * 3, [1.5] * 3), ("fresh", True)),
        # The start is 0.5 better on each row: more than its standard error, which is 0.
        (([1.0, 1.0, 1.0], [2.5, 2.5, 2.5]), ([3.0] * 3, [1.5] * 3), ("mix", False)),
        # Better by 0.1 on average, by differences of -0.9, 0.3, 0.3: their error is 0.4.
        (([1.1, 2.3, 2.3], [2.5, 2.5, 2.5]), ([3.0] * 3, [2.0] * 3), ("fresh", True)),
        (([2.0] * 3, [math.inf] * 3), ([3.0] * 3, [math.inf] * 3), ("mix", False)),
        (([2.0] * 3, [math.inf] * 3), ([3.0] * 3, [2.9] * 3), ("mix", False)),
    ],
)
def test_training_is_left_out_only_where_rows_show_that_it_harms(
    mix: tuple[list[float], list[float]],
    fresh: tuple[list[float], list[float]],
    wanted: tuple[str, bool],
) -> None:
    assert best_way([trial("mix", *mix), trial("fresh", *fresh)], [1, 1, 1]) == wanted


def test_nothing_finite_is_an_error() -> None:
    with pytest.raises(RunError, match="no start has a finite loss"):
        best_way([trial("mix", [math.inf], [math.inf])], [1])
