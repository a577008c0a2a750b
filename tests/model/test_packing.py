"""Packed layout: what is shared, what is padded, where responses are predicted."""

from __future__ import annotations

from itertools import pairwise, product

from hypothesis import given
from hypothesis import strategies as st

from fedmira.model.packed.packing import (
    common_prefix,
    gather,
    joined,
    pack,
    segment_rows,
)
from tiny import TinyRow, draw_rows


def test_prefix_is_shared_by_all_rows_and_leaves_each_row_its_last_prompt_token() -> None:
    rows = [TinyRow((5, 6, 7, 8), (9,)), TinyRow((5, 6, 7), (9,)), TinyRow((5, 6, 9, 9), (9,))]
    assert (
        common_prefix(rows) == 2
    )  # 5 6; the second row's 7 would be its last prompt token, which predicts
    assert common_prefix([TinyRow((5, 6), (9,)), TinyRow((5, 6), (4,))]) == 1


@given(st.integers(2, 9), st.integers(0, 20), st.integers(0, 999))
def test_every_row_can_be_read_back_from_the_packed_row(count: int, shared: int, seed: int) -> None:
    rows = draw_rows(count, shared, seed)
    (segment,) = segment_rows(0, rows, 10_000)
    batch = pack([segment])
    assert len(batch.ids) == segment.num_tokens
    place = segment.prefix
    for row, index, length in zip(segment.rows, segment.indices, segment.lengths, strict=True):
        assert row is rows[index]
        read = [*row.prompt, *row.response[:-1]]  # the last response token is only predicted
        assert [
            *batch.ids[: segment.prefix].tolist(),
            *batch.ids[place : place + length].tolist(),
        ] == read
        assert batch.positions[place : place + length].tolist() == list(
            range(segment.prefix, len(read))
        )
        place += length
    assert place == len(batch.ids)


@given(st.integers(1, 9), st.integers(0, 20), st.integers(0, 999), st.integers(10, 200))
def test_response_tokens_are_predicted_once_whatever_the_budget(
    count: int, shared: int, seed: int, budget: int
) -> None:
    rows = draw_rows(count, shared, seed)
    found: dict[int, list[int]] = {i: [] for i in range(count)}
    for chosen in gather(segment_rows(3, rows, budget), budget):
        batch = pack(chosen)
        assert len(chosen) == 1 or len(batch.ids) <= budget
        for row, target, client in zip(
            batch.rows.tolist(), batch.targets.tolist(), batch.clients.tolist(), strict=True
        ):
            assert client == 3
            found[row].append(target)
    assert found == {i: list(row.response) for i, row in enumerate(rows)}


def test_ragged_rows_are_not_padded() -> None:
    lengths = (5, 60, 6, 58, 5, 61)
    rows = [TinyRow((4,) * 10 + (5 + i,), (6,) * length) for i, length in enumerate(lengths)]
    (segment,) = segment_rows(0, rows, 10_000)
    assert segment.num_tokens == 10 + sum(1 + length - 1 for length in lengths)


def test_a_batch_of_two_tasks_becomes_a_segment_for_each_when_that_computes_less() -> None:
    first, second = (1,) * 100, (2,) * 100
    rows = [TinyRow((9, *task, 50 + i), (6,)) for i in range(3) for task in (first, second)]
    segments = segment_rows(0, rows, 10_000)
    assert [segment.prefix for segment in segments] == [101, 101]
    assert [sorted(segment.indices) for segment in segments] == [[0, 2, 4], [1, 3, 5]]
    assert sum(segment.num_tokens for segment in segments) == 2 * (101 + 3)


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=7
    ),
    st.integers(20, 400),
)
def test_no_other_cut_of_the_ordered_rows_computes_fewer_tokens(
    shapes: list[tuple[int, int, int]], budget: int
) -> None:
    """Rows of two levels of shared text, 30 and 20 tokens.

    All 2^(n-1) cuts of the ordered rows are tried.
    """
    rows = [
        TinyRow((*[10 + task] * 30, *[20 + part] * 20, 100 + i), (6,) * size)
        for i, (task, part, size) in enumerate(shapes)
    ]
    ordered = sorted(rows, key=lambda row: row.prompt)

    def tokens(part: list[TinyRow]) -> int:
        shared = common_prefix(part) if len(part) > 1 else 0
        return shared + sum(len(row.prompt) + len(row.response) - 1 - shared for row in part)

    costs = []
    for cuts in product((False, True), repeat=len(rows) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(rows)]
        parts = [ordered[start:end] for start, end in pairwise(edges)]
        if all(len(part) == 1 or tokens(part) <= budget for part in parts):
            costs.append(sum(tokens(part) + 16 for part in parts))
    found = segment_rows(0, rows, budget)
    assert sum(segment.num_tokens + 16 for segment in found) == min(costs)


def test_neighbouring_segments_of_a_client_have_one_owner() -> None:
    first, second = (1,) * 100, (2,) * 100
    rows = [TinyRow((9, *task, 50 + i), (6, 7)) for i in range(3) for task in (first, second)]
    batch = pack([*segment_rows(4, rows, 10_000), *segment_rows(1, rows[:1], 10_000)])
    assert [segment.client for segment in batch.segments] == [4, 4, 1]
    # Client 4: two segments of 101 shared tokens and 3 rows of 2 tokens. Client 1: 102 prompt
    # tokens and 1 response token that is read.
    assert batch.owners == [(4, slice(0, 2 * 107)), (1, slice(2 * 107, 2 * 107 + 103))]
    assert batch.readers == [(4, slice(0, 12)), (1, slice(12, 14))]
    assert joined([(0, 2), (1, 3), (0, 4)]) == [
        (0, slice(0, 2)),
        (1, slice(2, 5)),
        (0, slice(5, 9)),
    ]
    assert joined([]) == []
