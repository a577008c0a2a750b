"""Packed layout: what is shared, what is padded, where responses are predicted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedmira.model.packing import common_prefix, gather, pack, segment_rows
from tiny import TinyRow, draw_rows


def test_prefix_is_shared_by_all_rows_and_leaves_each_row_its_last_prompt_token() -> None:
    rows = [TinyRow((5, 6, 7, 8), (9,)), TinyRow((5, 6, 7), (9,)), TinyRow((5, 6, 9, 9), (9,))]
    assert common_prefix(rows) == 2  # 5 6; the second row's 7 would be its last prompt token, which predicts
    assert common_prefix([TinyRow((5, 6), (9,)), TinyRow((5, 6), (4,))]) == 1


@given(st.integers(2, 9), st.integers(0, 20), st.integers(0, 999))
def test_every_row_can_be_read_back_from_the_packed_row(count: int, shared: int, seed: int) -> None:
    rows = draw_rows(count, shared, seed)
    (segment,) = segment_rows(0, rows, 10_000)
    batch = pack([segment])
    assert len(batch.ids) == segment.num_tokens
    place = segment.prefix
    for group in segment.groups:
        for index in group.rows:
            whole = [*batch.ids[: segment.prefix].tolist(), *batch.ids[place : place + group.size].tolist()]
            read = [*rows[index].prompt, *rows[index].response[:-1]]  # the last response token is only predicted
            assert whole[: len(read)] == read
            assert batch.positions[place : place + group.size].tolist() == list(range(segment.prefix, segment.prefix + group.size))
            place += group.size
    assert place == len(batch.ids)


@given(st.integers(1, 9), st.integers(0, 20), st.integers(0, 999), st.integers(10, 200))
def test_response_tokens_are_predicted_once_whatever_the_budget(count: int, shared: int, seed: int, budget: int) -> None:
    rows = draw_rows(count, shared, seed)
    found: dict[int, list[int]] = {i: [] for i in range(count)}
    for chosen in gather(segment_rows(3, rows, budget), budget):
        batch = pack(chosen)
        assert len(chosen) == 1 or len(batch.ids) <= budget
        for row, target, client in zip(batch.rows.tolist(), batch.targets.tolist(), batch.clients.tolist(), strict=True):
            assert client == 3
            found[row].append(target)
    assert found == {i: list(row.response) for i, row in enumerate(rows)}


def test_ragged_rows_are_grouped_by_length_so_that_little_is_padded() -> None:
    rows = [TinyRow((4,) * 10 + (5 + i,), (6,) * length) for i, length in enumerate((5, 60, 6, 58, 5, 61))]
    (segment,) = segment_rows(0, rows, 10_000)
    real = segment.prefix + sum(1 + length - 1 for length in (5, 60, 6, 58, 5, 61))
    padded = segment.num_tokens - real
    assert len(segment.groups) == 2
    assert padded == (6 - 5) * 2 + (61 - 60) + (61 - 58)
