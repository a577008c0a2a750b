"""However a run ends, its folder says how, its adapters are saved, and a resume makes it whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedmira.errors import RunError
from fedmira.experiment import Experiment, build_experiment, resume_experiment, run_experiment
from fedmira.model import BaseModel
from fedmira.observers import (
    ClientEvent,
    Dispatcher,
    EarlyStopping,
    EndEvent,
    EvaluationEvent,
    JoinEvent,
    Observer,
    RoundEvent,
    RunFacts,
    StartEvent,
    Stop,
)
from fedmira.runs import Result, RunFolder
from small import CLIENTS, adapter_bytes, events_of, make_config, table_of

ROUNDS = 3
SETTINGS: Mapping[str, Any] = {
    "algorithm.name": "fedavg",
    "rounds.count": ROUNDS,
    "evaluation.every": 1,
}


class Notes(Observer):
    """Writes down all events, and answers `stop` to the first that `when` names."""

    def __init__(self, when: tuple[str, int] = ("", 0)) -> None:
        self.events: list[Any] = []
        self.when = when

    def _note(self, name: str, event: Any, number: int) -> Stop | None:
        self.events.append(event)
        return Stop("enough") if (name, number) == self.when else None

    def on_start(self, event: StartEvent) -> Stop | None:
        return self._note("start", event, 0)

    def on_client(self, event: ClientEvent) -> Stop | None:
        return self._note("client", event, event.round)

    def on_evaluation(self, event: EvaluationEvent) -> Stop | None:
        return self._note("evaluation", event, event.round)

    def on_round(self, event: RoundEvent) -> Stop | None:
        return self._note("round", event, event.round)

    def on_end(self, event: EndEvent) -> Stop | None:
        return self._note("end", event, 0)


class Breaking(Observer):
    """Raises `error` at the first client of round 2."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def on_client(self, event: ClientEvent) -> None:
        if event.round == 2:
            self.calls += 1
            raise self.error


@pytest.fixture(scope="module")
def experiment(base: BaseModel, base_folder: Path, clients_folder: Path) -> Experiment:
    return build_experiment(make_config(base_folder, clients_folder, SETTINGS), base)


@pytest.fixture(scope="module")
def whole(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run_experiment(experiment, tmp_path_factory.mktemp("whole") / "run")


def run_json(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return document


def assert_whole_after_resume(experiment: Experiment, folder: Path, whole: Result) -> None:
    identity = run_json(folder)["id"]
    resumed = resume_experiment(experiment, folder)
    assert resumed.status == "finished" and run_json(folder)["error"] is None
    assert run_json(folder)["id"] == identity
    assert adapter_bytes(folder) == adapter_bytes(whole.folder)
    assert events_of(folder, timing=False) == events_of(whole.folder, timing=False)
    assert table_of(folder, "clients") == table_of(whole.folder, "clients")


def test_events_come_in_order_and_say_what_the_files_say(
    experiment: Experiment, tmp_path: Path
) -> None:
    notes = Notes()
    result = run_experiment(experiment, tmp_path / "run", [notes])
    in_a_round = ["ClientEvent"] * len(CLIENTS) + ["EvaluationEvent", "RoundEvent"]
    assert [type(event).__name__ for event in notes.events] == [
        "StartEvent",
        "EvaluationEvent",
        *in_a_round * ROUNDS,
        "EndEvent",
    ]
    identity = run_json(result.folder)["id"]
    assert {event.run.id for event in notes.events} == {identity}
    start, end = notes.events[0], notes.events[-1]
    assert (start.clients, start.rounds, start.resumed) == (tuple(sorted(CLIENTS)), ROUNDS, None)
    assert start.run.config["rounds.count"] == ROUNDS
    assert (end.status, end.reason, end.summary) == ("finished", None, result.summary)
    rows = table_of(result.folder, "rounds")
    told = [event.figures for event in notes.events if isinstance(event, RoundEvent)]
    for row, figures in zip(rows, told, strict=True):
        assert {name: float(cell) if cell else None for name, cell in row.items()} == figures
    losses = {
        (event["round"], event["client"]): event["loss"]
        for event in events_of(result.folder, "train")
    }
    assert losses == {
        (event.round, event.client): event.metrics["loss"]
        for event in notes.events
        if isinstance(event, ClientEvent)
    }
    measured = {
        (event["round"], event["client"]): event["test_loss"]
        for event in events_of(result.folder, "evaluate")
    }
    assert measured == {
        (event.round, client): loss
        for event in notes.events
        if isinstance(event, EvaluationEvent)
        for client, loss in event.test.items()
    }


@pytest.mark.parametrize(
    ("when", "done"),
    [
        (("start", 0), 0),
        (("evaluation", 0), 0),
        (("client", 1), 1),
        (("evaluation", 2), 2),
        (("round", 2), 2),
    ],
)
def test_a_stop_ends_the_run_once_its_round_is_saved(
    when: tuple[str, int], done: int, experiment: Experiment, whole: Result, tmp_path: Path
) -> None:
    notes = Notes(when)
    result = run_experiment(experiment, tmp_path / "run", [notes])
    assert result.status == "stopped"
    document = run_json(result.folder)
    assert (document["status"], document["error"]) == ("stopped", "enough")
    assert document["rounds_done"] == done
    assert len(events_of(result.folder, "round")) == done
    assert set(result.adapters) == set(CLIENTS) and result.report.is_file()
    assert (notes.events[-1].status, notes.events[-1].reason) == ("stopped", "enough")
    assert_whole_after_resume(experiment, result.folder, whole)


@pytest.mark.parametrize("when", [("round", ROUNDS), ("end", 0)])
def test_a_stop_after_the_last_round_is_a_finished_run(
    when: tuple[str, int], experiment: Experiment, tmp_path: Path
) -> None:
    result = run_experiment(experiment, tmp_path / "run", [Notes(when)])
    assert result.status == run_json(result.folder)["status"] == "finished"


def test_an_observer_that_raises_is_reported_once_and_left_out(
    experiment: Experiment, whole: Result, tmp_path: Path
) -> None:
    broken, notes = Breaking(ValueError("no such thing")), Notes()
    result = run_experiment(experiment, tmp_path / "run", [broken, notes])
    assert result.status == "finished" and broken.calls == 1
    warnings = events_of(result.folder, "warning")
    assert [event["message"] for event in warnings] == [
        "the observer Breaking raised in on_client and is left out from here on: "
        "ValueError: no such thing"
    ]
    assert notes.events[-1].status == "finished", "the other observer goes on"
    assert adapter_bytes(result.folder) == adapter_bytes(whole.folder)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (KeyboardInterrupt(), "interrupted", "interrupted from the keyboard"),
        (
            OSError(28, "No space left on device"),
            "failed",
            "No space left on device; make room, and continue with --resume; what the last",
        ),
    ],
)
def test_what_was_trained_is_saved_when_a_round_cannot_be_completed(
    error: BaseException,
    status: str,
    reason: str,
    experiment: Experiment,
    whole: Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    append, notes, folder = RunFolder.append_round, Notes(), tmp_path / "run"

    def failing(self: RunFolder, row: Mapping[str, object]) -> None:
        if row["round"] == 2:
            raise error
        append(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_round", failing)
        with pytest.raises(RunError if isinstance(error, OSError) else type(error)):
            run_experiment(experiment, folder, [notes])
    document = run_json(folder)
    assert document["status"] == status and reason in document["error"]
    assert document["rounds_done"] == 1
    one = run_experiment(experiment, tmp_path / "one", [Notes(("round", 1))])
    assert (
        adapter_bytes(folder, cards=False).keys() == adapter_bytes(one.folder, cards=False).keys()
    )
    for client in CLIENTS:
        name = f"adapters/{client}/adapter_model.safetensors"
        assert adapter_bytes(folder)[name] == adapter_bytes(one.folder)[name]
    assert {row["rounds_trained"] for row in table_of(folder, "clients")} == {"1"}
    assert (folder / "report.html").is_file() and notes.events[-1].status == status
    assert_whole_after_resume(experiment, folder, whole)


def test_an_interrupt_before_anything_was_kept_says_so_and_can_be_resumed(
    experiment: Experiment, whole: Result, tmp_path: Path
) -> None:
    class Early(Observer):
        def on_evaluation(self, event: EvaluationEvent) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, tmp_path / "run", [Early()])
    assert run_json(tmp_path / "run")["status"] == "interrupted"
    assert_whole_after_resume(experiment, tmp_path / "run", whole)


def test_early_stopping_goes_on_waiting_after_a_resume(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "rounds.count": 6}
    experiment = build_experiment(make_config(base_folder, clients_folder, settings), base)
    rule = {"patience": 3, "min_delta": 100.0}  # nothing after the base is better by so much
    straight = run_experiment(experiment, tmp_path / "straight", [EarlyStopping(**rule)])
    assert run_json(straight.folder)["rounds_done"] == 3
    run_experiment(experiment, tmp_path / "run", [EarlyStopping(**rule), Notes(("round", 2))])
    resumed = resume_experiment(experiment, tmp_path / "run", [EarlyStopping(**rule)])
    assert run_json(resumed.folder)["rounds_done"] == 3
    assert "has not improved by more than 100 in 3" in run_json(resumed.folder)["error"]
    assert adapter_bytes(resumed.folder) == adapter_bytes(straight.folder)


def test_a_client_whose_loss_stopped_falling_trains_no_more_while_others_do(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "algorithm.name": "local", "rounds.count": 5}
    settings["local.learning_rate"] = 0.3  # so large that losses of some clients rise again
    experiment = build_experiment(make_config(base_folder, clients_folder, settings), base)
    rule = EarlyStopping(patience=1, per_client=True)
    result = run_experiment(experiment, tmp_path / "run", [rule])
    losses: dict[str, list[float]] = {client: [] for client in CLIENTS}
    for event in events_of(result.folder, "evaluate"):
        losses[event["client"]].append(event["validation_loss"])
    trained: dict[str, list[int]] = {client: [] for client in CLIENTS}
    for event in events_of(result.folder, "train"):
        trained[event["client"]].append(event["round"])
    for client, series in losses.items():
        worse = [i for i in range(1, len(series)) if series[i] >= min(series[:i])]
        last = worse[0] if worse else len(series) - 1
        assert trained[client] == list(range(1, last + 1)), (
            "one round without improvement is enough"
        )
    assert len({len(rounds) for rounds in trained.values()}) > 1, "clients stop at different times"
    steps = sum(event["steps"] for event in events_of(result.folder, "train"))
    assert steps < 5 * 2 * len(CLIENTS)


@pytest.mark.parametrize(
    ("method", "answer", "words"),
    [
        ("on_round", "enough", "returned 'enough' from on_round, which does nothing"),
        ("on_start", Stop, "from on_start, which does nothing"),
        ("resting", "ab", "returned 'ab' from resting"),
        ("resting", ["nobody"], "clients rest that this run does not have: 'nobody'"),
        ("state", {"value": object()}, "state that no checkpoint can hold"),
    ],
)
def test_an_answer_that_cannot_be_used_is_named_once_and_the_run_goes_on(
    method: str, answer: Any, words: str
) -> None:
    kind = type("Odd", (Observer,), {method: lambda *_: answer})
    said: list[str] = []
    watchers = Dispatcher([kind()], said.append)
    facts = RunFacts("1", "run", {})
    watchers.tell(StartEvent(facts, ("a", "b"), 2, Path(), None))
    for number in (1, 2):
        assert watchers.resting() <= {"nobody"} and watchers.states() == []
        watchers.tell(RoundEvent(facts, number, {}))
    assert watchers.stop is None
    assert len(said) == 1 and words in said[0] and "Odd" in said[0]


def test_a_mean_over_more_clients_is_not_held_against_the_one_before() -> None:
    """1.8 with the newcomer is no step back behind 1.5 without it; 1.9 behind 1.8 is one."""
    facts = RunFacts("1", "first", {"evaluation.every": 1})

    def after(number: int, loss: float) -> Stop | None:
        return rule.on_evaluation(EvaluationEvent(facts, number, {}, {}, loss, None))

    rule = EarlyStopping(patience=1, metric="test_loss")
    rule.on_start(StartEvent(facts, ("a", "b"), 9, Path(), None))
    assert after(1, 1.5) is None
    rule.on_join(JoinEvent(facts, 2, ("c",)))
    assert after(2, 1.8) is None
    assert after(3, 1.9) is not None


def test_a_client_that_joins_is_waited_for_as_those_were_who_began() -> None:
    facts = RunFacts("1", "first", {"evaluation.every": 1})
    rule = EarlyStopping(patience=1, metric="test_loss", per_client=True)
    rule.on_start(StartEvent(facts, ("a",), 9, Path(), None))
    losses = [{"a": 1.0}, {"a": 1.1, "c": 3.0}, {"a": 1.2, "c": 2.0}, {"a": 1.2, "c": 2.5}]
    stops = []
    for number, of in enumerate(losses, start=1):
        if number == 2:
            rule.on_join(JoinEvent(facts, 2, ("c",)))
        stops.append(rule.on_evaluation(EvaluationEvent(facts, number, of, {}, None, None)))
    assert [stop is not None for stop in stops] == [False, False, False, True]
