"""Adapters of clients that are not at work lie on disk.

Evaluating and saving everybody holds few of them at a time.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from torch import Tensor

from fedmira.adapters import Adapter, LazyAdapters, content_hash
from fedmira.clients import Evaluator
from fedmira.experiment import Experiment, build_experiment, run_experiment
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods import (
    Algorithm,
    Combined,
    PlainClient,
    ServerState,
    Start,
    Trained,
)
from fedmira.model import BaseModel
from fedmira.runs import Recorder
from fedmira.storage import AdapterTable, MemoryTable
from small import (
    adapters_of,
    events_of,
    make_config,
    table_of,
    with_algorithm_object,
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


@dataclass(frozen=True)
class Watched(PlainClient):
    """An algorithm that shows a watch what is read to be evaluated or saved."""

    inner: Algorithm
    watch: Watch

    @property
    def aligns(self) -> bool:
        return self.inner.aligns

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        return self.inner.initial_state(starts)

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        return self.inner.instruct(state, client)

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        return self.inner.combine(state, replies)

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        return self.watch(self.inner.adapter_for(state, client))

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        return self.inner.begin(payload, memory)

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        return self.inner.finish(payload, memory, trained)


@pytest.fixture(scope="module")
def experiment(
    base: BaseModel, base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Experiment:
    clients = {f"{('apple', 'birch')[k % 2]}-{k:02d}": 10 for k in range(24)}
    folder = write_clients(tmp_path_factory.mktemp("many") / "clients", clients)
    return build_experiment(make_config(base_folder, folder, SETTINGS), base)


def few_at_a_time(experiment: Experiment) -> Experiment:
    assert isinstance(experiment.evaluator, Evaluator)
    return replace(experiment, evaluator=replace(experiment.evaluator, at_once=AT_ONCE))


def test_everybody_is_evaluated_and_saved_a_few_at_a_time(
    experiment: Experiment, tmp_path: Path
) -> None:
    watch, experiment = Watch(), few_at_a_time(experiment)
    result = run_experiment(
        with_algorithm_object(experiment, Watched(experiment.algorithm, watch)), tmp_path / "run"
    )
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
    texts = few_at_a_time(experiment).evaluator.generations(
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
        kinds.add((type(state.adapters), type(self.memories())))

    monkeypatch.setattr(Recorder, "_checkpoint", note)
    result = run_experiment(experiment, tmp_path / "run")
    assert kinds == {(AdapterTable, MemoryTable)}
    assert stored[0] == 1, "the common start of all clients is one file"
    trained = {event["client"] for event in events_of(result.folder, "train")}
    assert 1 < stored[-1] <= 1 + 3 * len(trained), (
        "the start, and of each client that trained: what it sent, what it is, its best"
    )
    assert [int(row["clients"]) for row in table_of(result.folder, "rounds")] == [2, 2, 2]
