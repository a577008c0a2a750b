"""Rows to clients: every row goes to one client, and small shares are refused.

Categories stay together where they should.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedmira.config import DataSettings
from fedmira.data import Example, RawTask
from fedmira.data.partition import ClientRows, Partition, partition_tasks
from fedmira.data.randomness import generator, shuffled
from fedmira.errors import DataError


def rows(name: str, count: int) -> list[Example]:
    return [Example("Do.", f"{name} {i}", "x") for i in range(count)]


EIGHT = [RawTask(f"cat_{c}", f"cat_{c}", rows(f"cat_{c}", 40 + 7 * c)) for c in range(8)]


def partition(tasks: list[RawTask], seed: int = 0, **keys: object) -> Partition:
    return partition_tasks(tasks, DataSettings(**{"source": "dolly", **keys}), seed)  # type: ignore[arg-type]


def assert_is_a_partition(clients: tuple[ClientRows, ...], tasks: list[RawTask]) -> None:
    dealt = Counter(row for client in clients for row in client.examples)
    assert dealt == Counter(row for task in tasks for row in task.examples)


def test_task_makes_a_client_of_each_task_in_the_order_of_the_source() -> None:
    tasks = [RawTask(name, "c", rows(name, 5)) for name in ("b", "a", "c")]
    result = partition(tasks)
    assert [(client.client_id, client.task, client.category) for client in result.clients] == [
        ("b", "b", "c"),
        ("a", "a", "c"),
        ("c", "c", "c"),
    ]
    assert [client.client_id for client in partition(tasks, clients=2).clients] == ["b", "a"]


def test_category_gives_eight_times_ten_clients_with_even_shares() -> None:
    clients = partition(EIGHT, partition="category", clients_per_category=10).clients
    assert len(clients) == 80
    assert_is_a_partition(clients, EIGHT)
    assert Counter(client.category for client in clients) == {f"cat_{c}": 10 for c in range(8)}
    for client in clients:
        whole = 40 + 7 * int(client.category[-1])
        assert len(client.examples) in (whole // 10, -(-whole // 10))
        assert all(row.input.startswith(client.category) for row in client.examples)
    assert clients[0].client_id == "cat_0-0" and clients[-1].client_id == "cat_7-9"


def test_a_category_is_dealt_independently_of_the_others() -> None:
    together = partition(EIGHT, partition="category", clients_per_category=2).clients
    alone = partition(EIGHT[3:4], partition="category", clients_per_category=2).clients
    assert [client for client in together if client.category == "cat_3"] == list(alone)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 5))
def test_rows_that_all_differ_are_dealt_like_cards(total: int, count: int, seed: int) -> None:
    task = RawTask("cat", "cat", rows("cat", total))
    clients = partition(
        [task], seed, partition="category", clients_per_category=count, min_rows=1
    ).clients
    order = shuffled(task.examples, generator(seed, "category", "cat", "examples"))
    assert [list(client.examples) for client in clients] == [
        order[k::count] for k in range(count) if k < total
    ]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 12), min_size=12, max_size=60), st.integers(2, 4), st.integers(0, 5))
def test_rows_with_one_prompt_go_to_one_client_of_a_category(
    prompts: list[int], count: int, seed: int
) -> None:
    given_rows = [
        Example("Do.", f"row {prompt}", f"answer {k}") for k, prompt in enumerate(prompts)
    ]
    own_test = [Example("Do.", f"row {prompt}", "yes") for prompt in range(0, 15, 2)]
    tasks = [RawTask("cat", "cat", given_rows, own_test)]
    clients = partition(
        tasks, seed, partition="category", clients_per_category=count, min_rows=1
    ).clients
    assume(
        len(clients) == count
    )  # with fewer prompts than clients, some have no rows and are left out
    assert_is_a_partition(clients, tasks)
    assert sorted(row.input for client in clients for row in client.test or ()) == sorted(
        row.input for row in own_test
    )
    holders = Counter(
        prompt
        for client in clients
        for prompt in {row.prompt for row in (*client.examples, *(client.test or ()))}
    )
    assert set(holders.values()) == {1}
    sizes, largest = [len(client.examples) for client in clients], max(Counter(prompts).values())
    assert max(sizes) - min(sizes) <= largest, "the client with fewest gets the next prompt"


def test_a_prompt_under_two_categories_stays_in_both() -> None:
    """The categories are other tasks; which of them may ask the same is for the source to say."""
    tasks = [
        RawTask(name, name, [Example("Do.", "the same", name), *rows(name, 11)])
        for name in ("one", "two")
    ]
    clients = partition(tasks, partition="category", clients_per_category=2).clients
    assert sorted(
        row.output for client in clients for row in client.examples if row.input == "the same"
    ) == ["one", "two"]
    assert all(
        row.output in (client.category, "x") for client in clients for row in client.examples
    )


def test_category_pools_its_tasks_and_deals_their_own_test_rows_as_test_rows() -> None:
    tasks = [
        RawTask(name, "Question Answering", rows(name, 6), rows(f"{name} test", 4)) for name in "ab"
    ]
    clients = partition(tasks, partition="category", clients_per_category=2).clients
    assert [client.client_id for client in clients] == [
        "Question-Answering-0",
        "Question-Answering-1",
    ]
    assert [len(client.examples) for client in clients] == [6, 6]
    test = [row for client in clients for row in client.test or ()]
    assert sorted(row.input for row in test) == sorted(
        row.input for task in tasks for row in task.test or ()
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 12), st.sampled_from([0.1, 0.5, 5.0]), st.integers(0, 5))
def test_dirichlet_is_a_partition_with_the_fewest_rows(count: int, alpha: float, seed: int) -> None:
    clients = partition(
        EIGHT,
        seed,
        partition="dirichlet",
        dirichlet_clients=count,
        dirichlet_alpha=alpha,
        min_rows=10,
    ).clients
    assert len(clients) == count
    assert_is_a_partition(clients, EIGHT)
    assert min(len(client.examples) for client in clients) >= 10


def test_dirichlet_depends_on_its_seed_only() -> None:
    keys = {"partition": "dirichlet", "dirichlet_clients": 5}
    assert partition(EIGHT, 1, **keys) == partition(EIGHT, 1, **keys)
    assert partition(EIGHT, 1, **keys) != partition(EIGHT, 2, **keys)


def test_a_small_alpha_mixes_less_than_a_large_one() -> None:
    def share_of_the_largest_category(alpha: float) -> float:
        clients = partition(
            EIGHT, partition="dirichlet", dirichlet_clients=8, dirichlet_alpha=alpha
        ).clients
        return (
            sum(
                max(Counter(row.input[:5] for row in client.examples).values())
                / len(client.examples)
                for client in clients
            )
            / 8
        )

    assert share_of_the_largest_category(0.1) > 2 * share_of_the_largest_category(100.0)


def test_dirichlet_deals_test_rows_in_the_proportions_of_the_training_rows() -> None:
    tasks = [
        RawTask(f"t{c}", f"c{c}", rows(f"c{c} train", 200), rows(f"c{c} test", 100))
        for c in range(3)
    ]
    for client in partition(tasks, partition="dirichlet", dirichlet_clients=4).clients:
        train, test = (
            Counter(row.input[:2] for row in part or ()) for part in (client.examples, client.test)
        )
        assert test and all(abs(train[name] / 2 - test[name]) <= 1 for name in ("c0", "c1", "c2"))


def test_small_clients_are_skipped_with_their_rows_and_the_minimum() -> None:
    result = partition(
        [RawTask("big", "c", rows("big", 4)), RawTask("small", "c", rows("small", 3))], min_rows=4
    )
    assert [client.client_id for client in result.clients] == ["big"]
    assert result.skipped == ("small: 3 rows; data.min_rows is 4",)


def test_no_client_left_lists_them_all() -> None:
    with pytest.raises(DataError) as error:
        partition([RawTask("one", "c", rows("one", 1)), RawTask("two", "c", rows("two", 2))])
    assert error.value.problems == (
        "no client has at least 4 rows (data.min_rows)",
        "one: 1 rows; data.min_rows is 4",
        "two: 2 rows; data.min_rows is 4",
    )


def test_more_clients_than_there_are() -> None:
    with pytest.raises(
        DataError,
        match="data.clients is 9; the source gives 8 clients with at least 4 rows; set it to 0",
    ):
        partition(EIGHT, clients=9)


@pytest.mark.parametrize("kind", ["category", "dirichlet"])
def test_tasks_without_category_are_all_named(kind: str) -> None:
    with pytest.raises(DataError) as error:
        partition(
            [
                RawTask("a", "", rows("a", 5)),
                RawTask("b", "c", rows("b", 5)),
                RawTask("d", "", rows("d", 5)),
            ],
            partition=kind,
        )
    assert [problem.split("'")[1] for problem in error.value.problems] == ["a", "d"]


def test_dirichlet_with_too_few_rows_for_its_clients() -> None:
    with pytest.raises(
        DataError,
        match=r"8 rows are too few for 3 clients \(data.dirichlet_clients\) with at least 4 rows",
    ):
        partition([RawTask("a", "c", rows("a", 8))], partition="dirichlet", dirichlet_clients=3)


def test_dirichlet_gives_up_after_a_bounded_number_of_draws() -> None:
    # 12 rows for 3 clients with 4 each: a draw would have to cut the one category exactly in
    # thirds.
    with pytest.raises(
        DataError,
        match=r"in 1000 draws the smallest of 3 clients had at most \d rows; must have 4 .*raise "
        r"data.dirichlet_alpha",
    ):
        partition(
            [RawTask("a", "c", rows("a", 12))],
            partition="dirichlet",
            dirichlet_clients=3,
            dirichlet_alpha=0.01,
        )


@pytest.mark.parametrize("kind", ["category", "dirichlet"])
def test_test_rows_in_some_tasks_only_are_refused(kind: str) -> None:
    tasks = [RawTask("a", "c", rows("a", 5), rows("a test", 2)), RawTask("b", "c", rows("b", 5))]
    with pytest.raises(
        DataError, match="1 of its 2 tasks set test rows aside; either all do or none"
    ):
        partition(tasks, partition=kind, dirichlet_clients=2)


def test_a_task_name_twice_is_refused() -> None:
    with pytest.raises(DataError, match="task 'a' stands 2 times in the source"):
        partition([RawTask("a", "c", rows("a", 5)), RawTask("a", "c", rows("b", 5))])


def test_column_needs_a_source_with_columns() -> None:
    with pytest.raises(
        DataError,
        match="data.partition = 'column' needs source jsonl or hub; dolly has no client column",
    ):
        partition(EIGHT, partition="column")
    assert len(partition(EIGHT, partition="column", source="jsonl").clients) == 8
