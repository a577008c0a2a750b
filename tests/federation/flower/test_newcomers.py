"""A client that joins a federation between rounds: who may, from what it begins, and what is said.

Nodes are added while the run goes on; nothing else is.
"""

from __future__ import annotations

import pytest

pytest.importorskip("flwr", reason="Flower is not installed; pip install 'fedmira[flower]'")

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedmira.config import Config
from fedmira.errors import ConfigError
from fedmira.federation.flower.records import bytes_of, record_of
from fedmira.federation.server import run_federation
from fedmira.observers import EarlyStopping, EvaluationEvent, JoinEvent, Observer, RoundEvent
from fedmira.runs import CheckpointFolder, Result, RunFolder
from fedmira.wire import Encoded, pack, unpack
from loopback import LoopbackGrid, Meddler
from small import CLIENTS, adapter_bytes, events_of, make_config, table_of

FOUNDERS = ("apple-1", "apple-2", "birch-1")
NEWCOMER, LATER = "birch-2", "apple-3"
NUMBERS = {name: 100 + i for i, name in enumerate(CLIENTS)}


class Killed(BaseException):
    """The server's process ends here."""


class Comes(Observer):
    """Connects nodes once a round is over.

    Args:
        grid: to which.
        at: round -> the names and configs of nodes that come behind it.
    """

    def __init__(self, grid: LoopbackGrid, at: Mapping[int, Mapping[int, Mapping[str, Any]]]):
        self.grid, self.at = grid, at
        self.joined: list[tuple[int, tuple[str, ...]]] = []

    def on_evaluation(self, event: EvaluationEvent) -> None:
        if event.round == 0:
            self._come(0)

    def on_round(self, event: RoundEvent) -> None:
        self._come(event.round)

    def on_join(self, event: JoinEvent) -> None:
        self.joined.append((event.round, event.clients))

    def _come(self, number: int) -> None:
        for node, config in self.at.get(number, {}).items():
            self.grid.nodes[node] = dict(config)


class Place:
    """A federation of three nodes, and others that may come."""

    def __init__(self, base: Path, data: Path, folder: Path) -> None:
        self.base, self.data, self.folder = base, data, folder

    def config(self, **more: Any) -> Config:
        settings = {
            "federation.nodes": len(FOUNDERS),
            "federation.wait_s": 0.5,
            "federation.reply_s": 0.3,
            "federation.open": True,
            "rounds.count": 4,
            "evaluation.every": 2,
            **{key.replace("__", "."): value for key, value in more.items()},
        }
        return make_config(self.base, self.data, settings)

    def nodes(self, names: Sequence[str], memory: str) -> dict[int, dict[str, Any]]:
        place = {"data-path": str(self.data), "memory": str(self.folder / memory)}
        return {NUMBERS[name]: {"name": name, **place} for name in names}

    def run(
        self,
        config: Config,
        come: Mapping[int, Sequence[str]],
        name: str = "run",
        *,
        there: Sequence[str] = FOUNDERS,
        meddler: Meddler | None = None,
        resume: bool = False,
        observers: Sequence[Observer] = (),
        extra: Mapping[int, Mapping[int, Mapping[str, Any]]] | None = None,
    ) -> tuple[Result, Comes]:
        grid = LoopbackGrid(config, self.nodes(there, f"{name}-memory"), meddler)
        at = {number: self.nodes(names, f"{name}-memory") for number, names in come.items()}
        comes = Comes(grid, {**at, **(extra or {})})
        output = self.folder / name
        watching = [comes, *observers]
        return run_federation(config, grid, output, resume=resume, observers=watching), comes

    def run_json(self, name: str = "run") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / name / "run.json").read_text("utf-8"))
        return found


@pytest.fixture
def place(base_folder: Path, clients_folder: Path, tmp_path: Path) -> Place:
    return Place(base_folder, clients_folder, tmp_path)


def sent_to(client: str, kind: str, into: list[Encoded]) -> Meddler:
    """Keeps the messages to one client."""

    def note(name: str, message: Message, reply: Message) -> Message:
        if name == client and message.metadata.message_type == kind:
            into.append(unpack(bytes_of(message.content)))
        return reply

    return note


def test_a_newcomer_joins_trains_and_gets_an_adapter_that_plain_peft_loads(place: Place) -> None:
    trained: list[Encoded] = []
    config = place.config(**{"algorithm.name": "two-level"})
    result, comes = place.run(config, {2: [NEWCOMER]}, meddler=sent_to(NEWCOMER, "train", trained))
    run = place.folder / "run"
    assert comes.joined == [(3, (NEWCOMER,))]
    assert [int(message.header["round"]) for message in trained] == [3, 4]
    assert list(result.adapters) == [*FOUNDERS, NEWCOMER]
    assert [row["client"] for row in table_of(run, "clients")] == [*FOUNDERS, NEWCOMER]
    rounds = {row["client"]: row["rounds_trained"] for row in table_of(run, "clients")}
    assert rounds == {**dict.fromkeys(FOUNDERS, "4"), NEWCOMER: "2"}
    assert [row["clients"] for row in table_of(run, "rounds")] == ["3", "3", "4", "4"]
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(place.base), run / "adapters" / NEWCOMER
    )
    saved = load_file(run / "adapters" / NEWCOMER / "adapter_model.safetensors")
    loaded = {name.replace(".default", ""): of for name, of in plain.state_dict().items()}
    assert saved and all(torch.equal(loaded[name], of) for name, of in saved.items())
    assert any(bool(of.any()) for name, of in saved.items() if ".lora_B." in name)


def test_who_joined_when_is_said_in_events_run_json_and_on_the_page(place: Place) -> None:
    place.run(place.config(**{"algorithm.name": "two-level"}), {2: [NEWCOMER]})
    run, told = place.folder / "run", place.run_json()
    (event,) = events_of(run, "join")
    party = next(p for p in told["federation"]["newcomers"] if p["client_id"] == NEWCOMER)
    assert (event["round"], event["client"], event["rows"]) == (3, NEWCOMER, party["train_rows"])
    assert party["round"] == 3
    assert [p["client_id"] for p in told["federation"]["parties"]] == list(FOUNDERS)
    assert told["data"]["clients"] == [*FOUNDERS, NEWCOMER] and told["clients"] == 4
    # What it began from was evaluated before it trained, and so was the base.
    row = next(row for row in table_of(run, "clients") if row["client"] == NEWCOMER)
    assert float(row["base_loss"]) == pytest.approx(event["base_loss"])
    assert event["test_loss"] < event["base_loss"]
    evaluated = [e["round"] for e in events_of(run, "evaluate") if e["client"] == NEWCOMER]
    assert evaluated == [4]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Who joined" in page and "over 3 clients before round 3 and over 4 from then on" in page


def test_a_run_that_nobody_joins_writes_the_same_bytes_as_one_that_is_closed(place: Place) -> None:
    place.run(place.config(), {}, "open")
    place.run(place.config(federation__open=False), {}, "closed")
    assert adapter_bytes(place.folder / "open") == adapter_bytes(place.folder / "closed")
    kinds = [events_of(place.folder / name, timing=False) for name in ("open", "closed")]
    assert kinds[0] == kinds[1]
    written = (place.folder / "closed" / "config.toml").read_text(encoding="utf-8")
    assert "open" not in written.partition("[federation]")[2]


@pytest.mark.parametrize("method", ["two-level", "mira", "scaffold", "fedavg"])
def test_a_run_that_is_killed_behind_the_join_ends_with_the_bytes_of_one_that_is_not(
    method: str, place: Place
) -> None:
    more = {} if method != "scaffold" else {"local.optimizer": "sgd", "local.learning_rate": 0.1}
    config = place.config(
        **{"algorithm.name": method, "rounds.participation": 0.7, "evaluation.every": 1}, **more
    )
    place.run(config, {1: [NEWCOMER], 2: [LATER]}, "whole")

    def kill(name: str, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and message.metadata.group_id == "3":
            raise Killed
        return reply

    with pytest.raises(Killed):
        place.run(config, {1: [NEWCOMER], 2: [LATER]}, "cut", meddler=kill)
    everybody = [*FOUNDERS, NEWCOMER, LATER]
    place.run(config, {}, "cut", there=everybody, resume=True)
    whole, cut = place.folder / "whole", place.folder / "cut"
    assert adapter_bytes(cut) == adapter_bytes(whole)
    assert table_of(cut, "clients") == table_of(whole, "clients")
    assert events_of(cut, timing=False) == events_of(whole, timing=False)
    assert (
        place.run_json("cut")["federation"]["newcomers"]
        == (place.run_json("whole")["federation"]["newcomers"])
    )


def test_the_checkpoint_before_its_first_round_has_the_newcomer(place: Place) -> None:
    config = place.config()

    def kill(name: str, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and message.metadata.group_id == "2":
            raise Killed
        return reply

    with pytest.raises(Killed):
        place.run(config, {1: [NEWCOMER]}, meddler=kill)
    folder = RunFolder.reopen(place.folder / "run")
    checkpoint = CheckpointFolder(folder.checkpoint).load()
    assert checkpoint is not None and checkpoint.round == 1
    assert NEWCOMER in checkpoint.state.adapters
    # The run that is cut short has its adapters saved, the newcomer's among them.
    assert (place.folder / "run" / "adapters" / NEWCOMER).is_dir()
    # It may be away when the run goes on, and takes part again once it is back.
    place.run(config, {2: [NEWCOMER]}, resume=True)
    trained = [e["round"] for e in events_of(folder.path, "train") if e["client"] == NEWCOMER]
    failed = [e["round"] for e in events_of(folder.path, "failure") if e["client"] == NEWCOMER]
    assert trained == [3, 4] and set(failed) == {2}


def test_a_name_that_is_not_listed_is_turned_away_with_a_code_and_said_once(place: Place) -> None:
    told: list[Encoded] = []
    config = place.config(federation__open=[LATER])
    place.run(config, {1: [NEWCOMER], 2: [LATER]}, meddler=sent_to(NEWCOMER, "query.refusal", told))
    run = place.folder / "run"
    assert NEWCOMER not in place.run_json()["data"]["clients"]
    assert [e["client"] for e in events_of(run, "join")] == [LATER]
    (warning,) = [e for e in events_of(run, "warning") if NEWCOMER in e["message"]]
    assert warning["message"].startswith("code not-invited") and warning["round"] == 2
    (refusal,) = told
    assert str(refusal.header["reason"]).startswith("code not-invited")
    # Who may join is nobody's business but the server's.
    assert LATER not in str(refusal.header["reason"])


def test_a_listed_newcomer_that_comes_too_early_waits_for_the_first_round(place: Place) -> None:
    config = place.config(federation__clients=list(FOUNDERS), federation__open=[NEWCOMER])
    _, comes = place.run(config, {}, there=[*FOUNDERS, NEWCOMER])
    assert comes.joined == [(1, (NEWCOMER,))]
    parties = place.run_json()["federation"]["parties"]
    assert [party["client_id"] for party in parties] == list(FOUNDERS)


def test_two_newcomers_at_once_stand_in_the_order_of_their_names(place: Place) -> None:
    result, comes = place.run(place.config(), {1: [NEWCOMER, LATER]})
    assert comes.joined == [(2, tuple(sorted((NEWCOMER, LATER))))]
    assert list(result.adapters) == [*FOUNDERS, *sorted((NEWCOMER, LATER))]


def test_no_more_join_than_the_settings_allow_and_the_others_are_told(place: Place) -> None:
    config = place.config(federation__most_clients=4)
    result, _ = place.run(config, {1: [NEWCOMER, LATER]})
    first, second = sorted((NEWCOMER, LATER))
    assert list(result.adapters) == [*FOUNDERS, first]
    warnings = [e["message"] for e in events_of(place.folder / "run", "warning")]
    assert any(second in text and "federation.most_clients" in text for text in warnings)
    with pytest.raises(ConfigError, match="nobody could join"):
        place.run(place.config(federation__most_clients=3), {}, "full")


def test_a_newcomer_in_the_last_round_trains_once(place: Place) -> None:
    place.run(place.config(), {3: [NEWCOMER], 4: [LATER]})
    rows = {r["client"]: r["rounds_trained"] for r in table_of(place.folder / "run", "clients")}
    assert rows[NEWCOMER] == "1" and LATER not in rows


def test_a_newcomer_that_fails_in_its_first_round_is_a_client_that_failed(place: Place) -> None:
    def lose(name: str, message: Message, reply: Message) -> Message | None:
        train = message.metadata.message_type == "train"
        return None if train and name == NEWCOMER and message.metadata.group_id == "2" else reply

    result, _ = place.run(place.config(), {1: [NEWCOMER]}, meddler=lose)
    run = place.folder / "run"
    assert [e["round"] for e in events_of(run, "failure") if e["client"] == NEWCOMER] == [2]
    assert [e["round"] for e in events_of(run, "train") if e["client"] == NEWCOMER] == [3, 4]
    assert NEWCOMER in result.adapters


def test_a_newcomer_that_never_says_who_it_is_keeps_nobody_waiting(place: Place) -> None:
    def silent(name: str, message: Message, reply: Message) -> Message | None:
        return None if name == NEWCOMER else reply

    result, comes = place.run(place.config(), {1: [NEWCOMER]}, meddler=silent)
    assert comes.joined == [] and list(result.adapters) == list(FOUNDERS)
    assert not events_of(place.folder / "run", "failure")


def test_a_newcomer_that_is_never_measured_has_no_early_losses_and_takes_part(
    place: Place,
) -> None:
    asked: list[str] = []

    def mute(name: str, message: Message, reply: Message) -> Message | None:
        if name == NEWCOMER and message.metadata.message_type == "evaluate.losses":
            asked.append(str(unpack(bytes_of(message.content)).header["split"]))
            return None
        return reply

    place.run(place.config(evaluation__every=0), {2: [NEWCOMER]}, meddler=mute)
    run = place.folder / "run"
    (event,) = events_of(run, "join")
    assert "base_loss" not in event and "test_loss" not in event
    # Who did not answer once is not asked again before its first round: the rest is the last one's.
    assert asked[0] == "test" and asked[1:3] == ["test", "validation"]
    row = next(row for row in table_of(run, "clients") if row["client"] == NEWCOMER)
    assert row["base_loss"] == "" and row["rounds_trained"] == "2"
    assert (run / "report.html").is_file()


def claims(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Meddler:
    """The newcomer says something else of itself."""

    def forge(name: str, message: Message, reply: Message) -> Message:
        header = unpack(bytes_of(reply.content)).header if not reply.has_error() else {}
        if name != NEWCOMER or "party" not in header:
            return reply
        party = json.dumps(change(json.loads(str(header["party"]))))
        return Message(record_of(pack(Encoded({}, {**header, "party": party}))), reply_to=message)

    return forge


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"client_id": "../../outside"}, "cannot name a folder"),
        ({"client_id": "APPLE-1"}, "where case is ignored"),
        ({"client_id": "apple-1"}, "is connected already"),
        ({"train_rows": 10**12}, "at most 1000000000"),
        ({"train_rows": 0}, "no training rows"),
        ({"task": "x\u202ey"}, "that can be seen"),
    ],
)
def test_a_newcomer_is_looked_at_as_the_founders_were(
    change: dict[str, Any],
    reason: str,
    place: Place,
    caplog: pytest.LogCaptureFixture,
) -> None:
    forger = claims(lambda party: {**party, **change})
    result, comes = place.run(place.config(rounds__count=2), {1: [NEWCOMER]}, meddler=forger)
    assert comes.joined == [] and list(result.adapters) == list(FOUNDERS)
    assert any(reason in record.message for record in caplog.records)
    assert not (place.folder.parent / "outside").exists()


def test_a_newcomer_whose_name_differs_by_case_from_a_client_that_is_away_is_refused(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """The founder is not connected when the run goes on, so that only the run knows its name."""
    config = place.config(rounds__count=3)

    def kill(name: str, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and message.metadata.group_id == "2":
            raise Killed
        return reply

    with pytest.raises(Killed):
        place.run(config, {}, meddler=kill)
    shouting = claims(lambda party: {**party, "client_id": "APPLE-1"})
    result, comes = place.run(
        config, {2: [NEWCOMER]}, there=FOUNDERS[1:], meddler=shouting, resume=True
    )
    assert comes.joined == [] and "APPLE-1" not in result.adapters
    assert any("where case is ignored" in record.message for record in caplog.records)


def test_a_rank_that_the_state_has_no_room_for_is_turned_away(place: Place) -> None:
    ranks = {"apple-1": 2, LATER: 4, NEWCOMER: 8}
    config = place.config(
        adapter__ranks=ranks,
        federation__open=[NEWCOMER, LATER],
        **{"algorithm.name": "two-level"},
    )
    result, _ = place.run(config, {1: [NEWCOMER, LATER]})
    assert list(result.adapters) == [*FOUNDERS, LATER]
    (warning,) = [e for e in events_of(place.folder / "run", "warning") if "rank 8" in e["message"]]
    assert "from 2 to 4" in warning["message"]


def test_with_few_clients_a_round_the_draw_depends_on_who_is_there_alone(place: Place) -> None:
    config = place.config(rounds__participation=0.5, rounds__count=6)
    place.run(config, {1: [NEWCOMER]}, "first")
    place.run(config, {1: [NEWCOMER]}, "again")
    drawn = [
        [(e["round"], e["client"]) for e in events_of(place.folder / name, "train")]
        for name in ("first", "again")
    ]
    assert drawn[0] == drawn[1]
    # Half of 3 rounded up is 2, and half of 4 is 2.
    assert all(len([1 for number, _ in drawn[0] if number == r]) == 2 for r in range(1, 7))
    assert adapter_bytes(place.folder / "first") == adapter_bytes(place.folder / "again")


def test_a_graph_of_categories_relates_a_newcomer_by_its_own(place: Place) -> None:
    categories = {name: name.partition("-")[0] for name in CLIENTS}

    def say(name: str, message: Message, reply: Message) -> Message:
        header = {} if reply.has_error() else unpack(bytes_of(reply.content)).header
        if "party" not in header or name == LATER:
            return reply
        party = {**json.loads(str(header["party"])), "category": categories[name]}
        content = Encoded({}, {**header, "party": json.dumps(party)})
        return Message(record_of(pack(content)), reply_to=message)

    config = place.config(graph__kind="category", **{"algorithm.name": "mira"})
    # The last one names no category, which this graph needs.
    result, _ = place.run(config, {1: [NEWCOMER, LATER]}, meddler=say)
    graph = json.loads((place.folder / "run" / "graph.json").read_text(encoding="utf-8"))
    pairs = {frozenset((edge["source"], edge["target"])) for edge in graph["edges"]}
    assert pairs == {frozenset(("apple-1", "apple-2")), frozenset(("birch-1", NEWCOMER))}
    assert LATER not in result.adapters
    warnings = [e["message"] for e in events_of(place.folder / "run", "warning")]
    assert any(LATER in text and "category" in text for text in warnings)


def test_early_stopping_of_clients_waits_for_a_newcomer_too(place: Place) -> None:
    """Founders rest from round 2 on; the run goes on with whoever came behind round 1."""
    stopping = EarlyStopping(patience=1, metric="test_loss", min_delta=100.0, per_client=True)
    config = place.config(evaluation__every=1)
    place.run(config, {0: [NEWCOMER]}, observers=[stopping])
    trained = [(e["round"], e["client"]) for e in events_of(place.folder / "run", "train")]
    assert (2, NEWCOMER) in trained


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"federation.open": ()}, "lists nobody"),
        ({"graph.shuffled": True, "algorithm.name": "mira"}, "graph.shuffled"),
        (
            {
                "privacy.kind": "client",
                "algorithm.name": "fedavg",
                "data.validation_fraction": 0.0,
                "privacy.noise": 1.0,
            },
            "privacy.kind = 'client'",
        ),
    ],
)
def test_what_could_not_be_kept_with_newcomers_is_refused_before_training(
    settings: dict[str, Any], reason: str, place: Place
) -> None:
    with pytest.raises(ValueError, match=reason):
        place.config(**settings)
