"""Four federations whose right ending is known: real small tasks, really trained, by the default.

Each client has 16 rows of a task of the demo; tasks of one family word one mapping differently.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import fedmira
from fedmira.config import ModelSettings
from fedmira.config.methods import DEFAULT
from fedmira.data.sources.demo import FAMILIES
from fedmira.model import BaseModel, load_base
from small import events_of

TASKS = {task.name: task for family in FAMILIES.values() for task in family}
SETTINGS = {
    "rounds.count": 8,
    "local.steps": 5,
    "local.batch_size": 4,
    "evaluation.every": 0,
    "evaluation.rouge": False,
    "engine.token_budget": 1024,
}
Losses = Mapping[str, float]


@pytest.fixture(scope="module")
def bundled() -> BaseModel:
    return load_base(ModelSettings(device="cpu"))


def rows_of(task: str, seed: int, test: int = 24) -> dict[str, list[dict[str, str]]]:
    """16 training rows and some others to measure on."""
    rng, found = random.Random(f"{task} {seed}"), {}
    while len(found) < 16 + test:
        text, answer = TASKS[task].draw(rng)
        found[text] = {"instruction": TASKS[task].instruction, "input": text, "output": answer}
    rows = list(found.values())
    return {"train": rows[:16], "test": rows[16:]}


def trained(
    folder: Path, base: BaseModel, clients: Mapping[str, Any], method: str
) -> tuple[Losses, list[dict[str, Any]]]:
    """Test loss by client at the end, and the lines of the rounds."""
    result = fedmira.run(
        method=method, clients=clients, base=base, settings=SETTINGS, output=folder / method
    )
    assert result.status == "finished"
    table = result.clients
    losses = dict(zip(table["client"], table["after_align_loss"], strict=True))
    return losses, events_of(folder / method, "align")


def mean(losses: Losses, of: Sequence[str] = ()) -> float:
    values = [losses[client] for client in of or losses]
    return sum(values) / len(values)


def worse(ours: Losses, alone: Losses) -> list[str]:
    """Clients that end worse than alone by more than what 24 rows can tell."""
    return [client for client in ours if ours[client] > 1.1 * alone[client] + 0.05]


def pulls_of(lines: Sequence[Mapping[str, Any]], clients: Sequence[str]) -> list[float]:
    return [line["pull"] for line in lines if line["client"] in clients and "pull" in line]


def test_strangers_are_left_alone_and_nobody_is_harmed(tmp_path: Path, bundled: BaseModel) -> None:
    clients = {
        name: rows_of(name, 0)
        for name in ("bank-app", "clinic-west", "office-mail", "registry-birth")
    }
    alone, _ = trained(tmp_path, bundled, clients, "local")
    ours, lines = trained(tmp_path, bundled, clients, DEFAULT)
    pulls = pulls_of(lines, list(clients))
    assert pulls and sum(pulls) / len(pulls) < 0.02
    assert mean(ours) < 1.05 * mean(alone)
    assert not worse(ours, alone)


def test_one_unlike_the_others_is_left_alone_and_the_others_gain(
    tmp_path: Path, bundled: BaseModel
) -> None:
    related = ("clinic-east", "clinic-north", "clinic-west")
    clients = {name: rows_of(name, 0) for name in (*related, "registry-birth")}
    alone, _ = trained(tmp_path, bundled, clients, "local")
    ours, lines = trained(tmp_path, bundled, clients, DEFAULT)
    assert mean(ours, related) < 0.95 * mean(alone, related)
    assert not worse(ours, alone)
    pulls = pulls_of(lines, ["registry-birth"]), pulls_of(lines, related)
    odd, others = (sum(each) / len(each) for each in pulls)
    assert odd < 0.02 < 0.05 < others


def test_two_groups_are_found_and_gain(tmp_path: Path, bundled: BaseModel) -> None:
    groups = ("bank-app", "bank-mail", "bank-phone"), ("clinic-east", "clinic-north", "clinic-west")
    clients = {name: rows_of(name, 0) for group in groups for name in group}
    alone, _ = trained(tmp_path, bundled, clients, "local")
    ours, _ = trained(tmp_path, bundled, clients, DEFAULT)
    assert mean(ours) < 0.85 * mean(alone)
    assert not worse(ours, alone)
    graph = fedmira.load(tmp_path / DEFAULT).graph
    within = across = 0.0
    for one, other, weight in graph.edges():
        if one.split("-")[0] == other.split("-")[0]:
            within += weight
        else:
            across += weight
    assert within > 20 * across


def test_clients_that_are_alike_reach_what_one_shared_adapter_reaches(
    tmp_path: Path, bundled: BaseModel
) -> None:
    clients = {f"branch-{k}": rows_of("bank-app", k) for k in range(4)}
    alone, _ = trained(tmp_path, bundled, clients, "local")
    shared, _ = trained(tmp_path, bundled, clients, "fedavg")
    ours, _ = trained(tmp_path, bundled, clients, DEFAULT)
    assert mean(ours) < 0.8 * mean(alone)
    assert mean(ours) < 1.3 * mean(shared)
