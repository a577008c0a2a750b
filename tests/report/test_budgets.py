"""Budgets are the sums of what the run folder says, and every inequality within a seed is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedmira.report import read_run
from fedmira.report.budgets import budget_of, dtype_of, inequalities

Folders = Callable[..., Any]


def test_a_budget_adds_up_what_was_written(run_folder: Folders) -> None:
    folder = run_folder(clients=4)
    for event in folder.events:
        if event["event"] == "train" and event["client"] == folder.names[0]:
            event["tokens"] = 2200
    found = budget_of(read_run(folder.write()))
    exchanges = 4 * len(folder.round_rows)
    assert found.local_steps == 7 * exchanges and found.response_tokens == 310 * exchanges
    assert found.tokens == 2100 * exchanges + 100 * len(folder.round_rows)
    assert (
        found.bytes_up == found.bytes_down == sum(row["bytes_up"] for row in folder.round_rows) > 0
    )
    assert (
        found.parameters_least
        == found.parameters_most
        == found.trained_least
        == found.trained_most
        == 43_008
    )


def test_what_the_folder_does_not_say_is_none(run_folder: Folders) -> None:
    folder = run_folder(clients=2)
    for event in folder.events:
        event.pop("steps", None)
    folder.fail_early("out of memory")
    found = budget_of(read_run(folder.write()))
    assert (
        found.local_steps is None
        and found.bytes_up is None
        and found.parameters_least is None
        and found.trained_most is None
    )
    assert found.response_tokens == 2 * 310


def test_equal_runs_are_equal(run_folder: Folders) -> None:
    runs = {
        name: read_run(run_folder(name, clients=3, algorithm=name).write())
        for name in ("local", "fedavg", "mira")
    }
    assert inequalities(runs, 0) == {} == inequalities({}, 0)


def more_steps(folder: Any) -> None:
    next(event for event in folder.events if event["event"] == "train")["steps"] += 3


def more_tokens(folder: Any) -> None:
    next(event for event in folder.events if event["event"] == "train")["response_tokens"] += 1


def other_rows(folder: Any) -> None:
    written = folder.provenance()
    folder.provenance = lambda: written | {"data": {"sha256": "12" * 32}}


def other_base(folder: Any) -> None:
    written = folder.provenance()
    folder.provenance = lambda: written | {"base": {"sha256": "34" * 32}}


def fewer_clients(folder: Any) -> None:
    folder.client_rows.pop()


def best_adapters(folder: Any) -> None:
    folder.more_settings = '\n[evaluation]\nselect = "best"\n'


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (more_steps, "mira, seed 4: other local steps: 423, and 420 under local"),
        (more_tokens, "mira, seed 4: other response tokens: 18,601, and 18,600 under local"),
        (
            other_rows,
            "mira, seed 4: other rows (sha256): 121212121212, and efefefefefef under local",
        ),
        (
            other_base,
            "mira, seed 4: other base model (sha256): 343434343434, and abababababab under local",
        ),
        (fewer_clients, "mira, seed 4: other clients: they are not the same"),
        (
            best_adapters,
            "mira, seed 4: other evaluation.select: best, and not recorded under local",
        ),
    ],
)
def test_each_inequality_is_named_with_both_values(
    change: Callable[[Any], None], expected: str, run_folder: Folders
) -> None:
    changed = run_folder("mira", clients=3, algorithm="mira")
    change(changed)
    runs = {
        name: run_folder(name, clients=3, algorithm=name).write() for name in ("local", "fedavg")
    } | {"mira": changed.write()}
    assert inequalities({name: read_run(path) for name, path in runs.items()}, 4) == {
        "mira": [expected]
    }


def test_what_a_client_sends_in_a_round_is_a_mean_over_replies(run_folder: Folders) -> None:
    folder = run_folder(clients=2)
    for event in folder.events:
        if event["event"] == "train":
            event |= {
                "bytes_up": 300 if event["client"] == folder.names[0] else 100,
                "bytes_down": 50,
            }
    found = budget_of(read_run(folder.write()))
    assert (found.bytes_up_each, found.bytes_down_each) == (200, 50)


@pytest.mark.parametrize(
    ("down", "up", "expected"),
    [
        ("float32", "float32", "float32"),
        ("float32+int32", "float32+int32", "float32+int32"),
        ("float32", "float16", "up float16; down float32"),
        ("", "float32", "up float32; down nothing"),
        (None, None, None),
    ],
)
def test_number_types_are_told_apart_by_way_where_they_differ(
    down: str | None, up: str | None, expected: str | None, run_folder: Folders
) -> None:
    folder = run_folder(clients=2)
    for event in folder.events:
        if event["event"] == "train" and down is not None:
            event |= {"dtype_down": down, "dtype_up": up}
    assert dtype_of(read_run(folder.write())) == expected
