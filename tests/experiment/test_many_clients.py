"""Adapters of clients that are not at work lie on disk.

Evaluating and saving everybody holds few of them at a time.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydantic import PrivateAttr
from torch import Tensor

from fedmira.adapters import Adapter, LazyAdapters, content_hash
from fedmira.experiment import Experiment, build_experiment, run_experiment
from fedmira.messages import ClientId
from fedmira.methods import (
    Mira,
    ServerState,
)
from fedmira.model import BaseModel
from fedmira.runs import Recorder
from fedmira.storage import AdapterTable, MemoryTable
from small import (
    adapters_of,
    events_of,
    local_of,
    make_config,
    table_of,
    with_clients,
    with_method_object,
    write_clients,
)

AT_ONCE = 3
SETTINGS = {
    "rounds.count": 3,
    "rounds.participation": 0.1,
    "graph.warmup_rounds": 0,
    "evaluation.every": 2,
}


class Held(dict[str, Tensor]):
    """An adapter that can be told from equal ones and watched."""

    __hash__ = object.__hash__  # type: ignore[assignment]


@dataclass
class Watch:
    """Counts the adapters that were read and still live."""

    alive: weakref.WeakSet[Held] = field(default_factory=weakref.WeakSet)
    reads: int = 0
    most: int = 0

    def __call__(self, adapter: Adapter) -> Adapter:
        held = Held(adapter)
        self.alive.add(held)
        self.reads += 1
        self.most = max(self.most, len(self.alive))
        return held


class Watched(Mira):
    """MIRA that shows a watch what is read to be evaluated or saved."""

    _watch: Watch = PrivateAttr(default_factory=Watch)

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        return self._watch(super().adapter_for(state, client))


@pytest.fixture(scope="module")
def experiment(
    base: BaseModel, base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Experiment:
    clients = {f"{('apple', 'birch')[k % 2]}-{k:02d}": 10 for k in range(24)}
    folder = write_clients(tmp_path_factory.mktemp("many") / "clients", clients)
    return build_experiment(make_config(base_folder, folder, SETTINGS), base)


def few_at_a_time(experiment: Experiment) -> Experiment:
    return with_clients(experiment, local_of(experiment, AT_ONCE))


def test_everybody_is_evaluated_and_saved_a_few_at_a_time(
    experiment: Experiment, tmp_path: Path
) -> None:
    watched = Watched()
    watch = watched._watch
    result = run_experiment(with_method_object(experiment, watched, AT_ONCE), tmp_path / "run")
    assert watch.reads > 4 * 24, (
        "the base, round 2, round 3 with test and validation rows, and the saving"
    )
    assert watch.most <= AT_ONCE + 1
    assert len(result.clients) == len(result.adapters) == 24
    saved = adapters_of(result.folder)
    index = json.loads((result.folder / "adapters" / "index.json").read_text(encoding="utf-8"))
    for client in experiment.ranks:
        assert index[client]["sha256"] == content_hash(result.adapters[client])
        assert all(
            (array == result.adapters[client][name].double().numpy()).all()
            for name, array in saved[client].items()
        )


def test_generation_reads_a_few_at_a_time(experiment: Experiment) -> None:
    watch, clients = Watch(), list(experiment.ranks)[:9]
    texts = local_of(experiment, AT_ONCE).generations(
        LazyAdapters(clients, lambda client: watch(experiment.starts[client])), 2
    )
    assert list(texts) == clients and watch.reads == 9 and watch.most <= AT_ONCE + 1


def test_the_state_of_a_run_lies_in_its_folder(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[int] = []
    kinds: set[tuple[type[object], type[object]]] = set()
    inner = Recorder._checkpoint

    def note(self: Recorder, number: int, state: ServerState) -> None:
        inner(self, number, state)
        stored.append(len(self.checkpoints.store))
        kinds.add((type(state.adapters), type(self.clients.memories)))

    monkeypatch.setattr(Recorder, "_checkpoint", note)
    result = run_experiment(experiment, tmp_path / "run")
    assert kinds == {(AdapterTable, MemoryTable)}
    assert stored[0] == 1, "the common start of all clients is one file"
    trained = {event["client"] for event in events_of(result.folder, "train")}
    assert 1 < stored[-1] <= 1 + 3 * len(trained), (
        "the start, and of each client that trained: what it sent, what it is, its best"
    )
    assert [int(row["clients"]) for row in table_of(result.folder, "rounds")] == [2, 2, 2]
