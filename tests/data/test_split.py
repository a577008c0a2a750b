"""The split of a client's rows.

Whole, deterministic, independent of other clients, and no prompt on two sides.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.config import DataSettings
from fedmira.data import Example
from fedmira.data.partition import ClientRows
from fedmira.data.problems import Problems
from fedmira.data.split import Split, split_rows
from fedmira.errors import DataError

MANY = [Example("Do.", str(i), f"answer {i}") for i in range(40)]


def split(
    rows: list[Example],
    seed: int = 0,
    client: str = "a",
    test: list[Example] | None = None,
    validation: list[Example] | None = None,
    position: int = 0,
    **keys: object,
) -> Split:
    problems = Problems()
    result = split_rows(
        ClientRows(client, "t", "c", rows, test, validation),
        DataSettings(**keys),
        seed,
        position,
        problems,
    )  # type: ignore[arg-type]
    problems.raise_if_any()
    assert result is not None
    return result


# A few prompts and a few outputs, so that copies and shared prompts are common.
rows_of = st.lists(
    st.builds(Example, st.just("Do."), st.sampled_from("abcdefghij"), st.sampled_from("xyz")),
    min_size=1,
    max_size=40,
)
fractions = st.sampled_from([(0.8, 0.0), (0.8, 0.1), (0.5, 0.25), (0.34, 0.33)])


@settings(deadline=None, max_examples=200)
@given(rows_of, fractions, st.integers(0, 3))
def test_every_distinct_row_is_on_one_side_and_no_prompt_on_two(
    rows: list[Example], shares: tuple[float, float], seed: int
) -> None:
    needed = 3 if shares[1] else 2
    keys = {"train_fraction": shares[0], "validation_fraction": shares[1]}
    if len({row.input for row in rows}) < needed:
        with pytest.raises(DataError, match="client 'a' has no"):
            split(rows, seed, **keys)
        return
    result = split(rows, seed, **keys)
    parts = (result.train, result.validation, result.test)
    everything = [row for part in parts for row in part]
    assert set(everything) == set(rows) and len(everything) == len(set(rows))
    assert result.duplicates == len(rows) - len(set(rows)) and result.overlaps == 0
    prompts = [{row.input for row in part} for part in parts]
    assert (
        not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    )
    assert result.train and result.test and bool(result.validation) == bool(shares[1])


@settings(deadline=None, max_examples=50)
@given(st.integers(3, 60), fractions)
def test_shares_of_rows_with_different_prompts_are_rounded_to_the_nearest_row(
    count: int, shares: tuple[float, float]
) -> None:
    result = split(
        MANY[:1] + [Example("Do.", f"row {i}", "x") for i in range(count - 1)],
        train_fraction=shares[0],
        validation_fraction=shares[1],
    )
    test_share = 1 - sum(shares)
    assert abs(len(result.test) - max(1, test_share * count)) <= 0.5 + 1e-6
    wanted = (count - len(result.test)) * shares[1] / sum(shares)
    assert abs(len(result.validation) - (max(1, wanted) if shares[1] else 0)) <= 0.5 + 1e-6
    assert len(result.train) == count - len(result.test) - len(result.validation)


def test_the_same_seed_and_client_give_the_same_split_and_others_another() -> None:
    assert split(MANY, seed=1) == split(MANY, seed=1)
    assert split(MANY, seed=1) != split(MANY, seed=2)
    assert split(MANY, client="a") != split(MANY, client="b")


def test_limits_cut_and_do_not_move_rows_to_another_side() -> None:
    whole = split(
        MANY, validation_fraction=0.1
    )  # 40 rows: 4 test, 36 * 1/9 = 4 validation, 32 train
    cut = split(MANY, validation_fraction=0.1, max_rows=16, test_rows=3)
    assert [len(part) for part in (whole.train, whole.validation, whole.test)] == [32, 4, 4]
    assert (cut.train, cut.validation, cut.test) == (
        whole.train[:16],
        whole.validation[:2],
        whole.test[:3],
    )  # 16 * 0.1 / 0.8 = 2


def test_growing_limits_nest() -> None:
    sizes = [split(MANY, max_rows=limit).train for limit in (4, 8, 16)]
    assert all(larger[: len(smaller)] == smaller for smaller, larger in pairwise(sizes))


def test_validation_keeps_a_row_however_small_the_limit() -> None:
    assert len(split(MANY, validation_fraction=0.1, max_rows=1).validation) == 1


def test_a_list_of_limits_is_given_in_turn_and_zero_is_no_limit() -> None:
    counts = [
        len(split(MANY, max_rows=(8, 16, 0), position=position).train) for position in range(5)
    ]
    assert counts == [8, 16, 32, 8, 16]


def test_test_rows_of_the_source_are_the_test_set_and_leave_training() -> None:
    test = [Example("Do.", "own", "x"), MANY[0], MANY[0]]
    result = split(MANY, test=test)
    assert set(result.test) == set(test) and len(result.test) == 2
    assert set(result.train) == set(MANY[1:])
    assert (result.duplicates, result.overlaps) == (1, 1)


def test_validation_rows_of_the_source_leave_training_and_yield_to_test() -> None:
    result = split(MANY, test=[MANY[0]], validation=[MANY[0], MANY[1]])
    assert result.validation == (MANY[1],)
    assert set(result.train) == set(MANY[2:])
    assert result.overlaps == 3  # rows 0 and 1 left training, row 0 left validation


def test_a_large_group_goes_to_training_and_not_past_the_test_share() -> None:
    repeated = [Example("Do.", "same", f"answer {i}") for i in range(10)]
    for seed in range(10):
        result = split(repeated + MANY[:10], seed=seed)  # 20 rows: at most 4 test rows
        assert len(result.test) == 4 and set(repeated) <= set(result.train)


def test_two_large_groups_still_give_one_to_each_side() -> None:
    rows = [
        Example("Do.", side, f"answer {i}")
        for side, count in (("small", 5), ("large", 6))
        for i in range(count)
    ]
    result = split(rows)
    assert {row.input for row in result.test} == {"small"} and {
        row.input for row in result.train
    } == {"large"}


@pytest.mark.parametrize(
    ("count", "keys", "missing"),
    [(1, {}, "training"), (2, {"validation_fraction": 0.1}, "training")],
)
def test_a_client_that_runs_out_of_prompts_is_named(
    count: int, keys: dict[str, float], missing: str
) -> None:
    with pytest.raises(
        DataError,
        match=rf"client 'a' has no {missing} rows left: it has {count} distinct rows with "
        rf"{count} distinct prompts",
    ):
        split(MANY[:count], **keys)


def test_a_client_whose_training_rows_all_stand_in_its_test_rows_is_named() -> None:
    with pytest.raises(DataError, match="client 'a' has no training rows left"):
        split(MANY[:3], test=MANY[:5])
