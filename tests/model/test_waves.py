"""Waves hold every prompt once, within the memory, with little padding."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.model.generation.waves import (
    CacheShape,
    Extent,
    Prompt,
    plan_waves,
)

SHAPE = CacheShape(100, 50)


def prompts_of(sizes: list[tuple[int, int]], shared: int = 0, seed: int = 0) -> list[Prompt]:
    """Prompts of (client, tokens) whose first `shared` tokens are the same."""
    draw = random.Random(seed)
    head = [draw.randrange(50) for _ in range(shared)]
    return [
        Prompt(index, client, [*head, *(draw.randrange(50) for _ in range(size))], [1], 8)
        for index, (client, size) in enumerate(sizes)
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60)), max_size=90),
    st.integers(1, 200_000),
    st.integers(0, 9),
)
def test_every_prompt_stands_in_one_wave_that_fits(
    sizes: list[tuple[int, int]], most: int, shared: int
) -> None:
    prompts = prompts_of(sizes, shared)
    waves = plan_waves(prompts, SHAPE, most)
    assert sorted(
        prompt.index for wave in waves for group in wave.groups for prompt in group.prompts
    ) == list(range(len(prompts)))
    for wave in waves:
        count = sum(len(group.prompts) for group in wave.groups)
        assert count == 1 or SHAPE.of(wave.size) <= most
        for group in wave.groups:
            heads = {tuple(prompt.prompt[: group.prefix]) for prompt in group.prompts}
            assert len(heads) == 1 and all(
                prompt.client == group.client for prompt in group.prompts
            )
            lengths = [len(prompt.prompt) for prompt in group.prompts]
            assert lengths == sorted(lengths, reverse=True) and (
                group.prefix < lengths[-1] or group.prefix == 0
            )


def test_bytes_count_shared_tokens_once() -> None:
    # 2 groups: 10 shared tokens each; 2 x 3 rows of 20 own and 8 new tokens; a row of scores for
    # each.
    assert SHAPE.of(Extent(2, 3, 10, 20, 8).size) == (2 * 10 + 2 * 3 * 28) * 100 + 2 * 3 * 50


def test_the_blocks_of_a_wave_have_columns_of_their_own() -> None:
    # 4 rows in both, the larger number; 10 + 9 shared tokens; 20 and 5 own and 8 new tokens.
    size = Extent(1, 3, 10, 20, 8).size.beside(Extent(1, 4, 9, 5, 6).size)
    assert SHAPE.of(size) == (10 + 9 + 4 * (20 + 8) + 4 * (5 + 8)) * 100 + 2 * 4 * 50


def test_clients_of_like_shape_share_a_block() -> None:
    (wave,) = plan_waves(
        prompts_of([(client, 20) for client in range(8) for _ in range(16)], 30), SHAPE, 2**30
    )
    assert len(wave.blocks) == 1


def test_long_prompts_have_a_block_of_their_own_beside_many_short_ones() -> None:
    prompts = prompts_of(
        [(client, 900 if client == 0 else 10) for client in range(9) for _ in range(16)]
    )
    (wave,) = plan_waves(prompts, SHAPE, 2**30)
    assert [len(block.groups) for block in wave.blocks] == [1, 8]


def test_one_row_does_not_stand_beside_groups_of_many() -> None:
    waves = plan_waves(
        prompts_of([(client, 10) for client in range(40) for _ in range(64 if client == 0 else 1)]),
        SHAPE,
        2**30,
    )
    assert [len(wave.groups) for wave in waves] == [1, 39]


def test_a_client_with_many_rows_is_cut_into_groups_of_like_length() -> None:
    (wave,) = plan_waves(prompts_of([(0, size) for size in range(1, 131)]), SHAPE, 2**30)
    assert sorted(len(group.prompts) for group in wave.groups) == [43, 43, 44]
