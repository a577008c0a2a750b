"""Who may take part in a federation.

What nodes say of themselves comes from elsewhere, and changes when they start again.
"""

from __future__ import annotations

import pytest

pytest.importorskip("flwr", reason="Flower is not installed; pip install 'fedmira[flower]'")

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Message

from fedmira.config import Config
from fedmira.experiment import prepare_kind
from fedmira.federation.flower import nodes
from fedmira.federation.flower.nodes import Nodes
from fedmira.federation.flower.records import bytes_of, record_of
from fedmira.federation.server import run_federation
from fedmira.model import tokenizer_hash
from fedmira.wire import Encoded, pack, unpack
from loopback import LoopbackGrid, Meddler
from small import events_of, make_config

NAMES = ("apple-1", "birch-2")
FIRST, SECOND = 100, 101


@pytest.fixture
def config(base_folder: Path, clients_folder: Path) -> Config:
    return make_config(
        base_folder, clients_folder, {"federation.wait_s": 5, "federation.reply_s": 5}
    )


@pytest.fixture
def make_grid(config: Config, clients_folder: Path, tmp_path: Path) -> Callable[..., LoopbackGrid]:
    def make(meddler: Meddler | None = None) -> LoopbackGrid:
        of = {"data-path": str(clients_folder), "memory": str(tmp_path / "memory")}
        return LoopbackGrid(
            config, {FIRST + i: {"name": name, **of} for i, name in enumerate(NAMES)}, meddler
        )

    return make


@pytest.fixture
def make_nodes(config: Config) -> Callable[[LoopbackGrid], Nodes]:
    base = prepare_kind(config).base
    return lambda grid: Nodes(grid, base.sha256, tokenizer_hash(base.tokenizer), (), 5.0)


def forged(change: Callable[[dict[str, Any]], Any]) -> Meddler:
    """The second node says something else of itself."""

    def forge(client: str, message: Message, reply: Message) -> Message:
        header = unpack(bytes_of(reply.content)).header
        if client != NAMES[1] or "party" not in header:
            return reply
        return saying(message, {**header, "party": change(json.loads(str(header["party"])))})

    return forge


def saying(message: Message, header: Mapping[str, Any]) -> Message:
    return Message(record_of(pack(Encoded({}, dict(header)))), reply_to=message)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda party: json.dumps({**party, "client_id": "../../outside"}), "cannot name a folder"),
        (lambda party: json.dumps({**party, "client_id": "/outside"}), "cannot name a folder"),
        (lambda party: json.dumps({**party, "client_id": "APPLE-1"}), "where case is ignored"),
        (lambda party: json.dumps({**party, "client_id": ["apple-1"]}), "must be a text"),
        (lambda party: json.dumps({**party, "train_rows": "many"}), "must be a whole number"),
        (lambda party: json.dumps({**party, "train_rows": -1}), "must be a whole number"),
        (lambda party: json.dumps({**party, "train_rows": True}), "must be a whole number"),
        (lambda party: json.dumps({**party, "train_rows": 0}), "has no training rows"),
        (lambda party: json.dumps({**party, "train_rows": 10**18}), "must be at most 1000000000"),
        (
            lambda party: json.dumps({**party, "train_tokens": 10**400}),
            "must be at most 1000000000",
        ),
        (
            lambda party: json.dumps({**party, "task": "x" * 10**6}),
            "must be at most 200 characters",
        ),
        (lambda party: json.dumps({**party, "category": "\x1b[31m"}), "'\\\\x1b[31m'"),
        (lambda party: json.dumps({**party, "more": 1}), "summary has the fields"),
        (lambda party: "[" * 100_000, "is no identity"),
        (lambda party: 7, "must be a text"),
    ],
)
def test_a_node_that_says_something_impossible_of_itself_is_refused(
    change: Callable[[dict[str, Any]], Any],
    reason: str,
    make_grid: Callable[..., LoopbackGrid],
    make_nodes: Callable[[LoopbackGrid], Nodes],
) -> None:
    grid = make_grid(forged(change))
    known = make_nodes(grid)
    assert list(known.gather((), 2, 0)) == [NAMES[0]]
    (refusal,) = known.refusals
    assert refusal.startswith("refused a node: ") and reason in refusal
    assert ("query.refusal", SECOND) in grid.delivered


def test_a_node_that_was_started_again_under_its_id_is_asked_again(
    make_grid: Callable[..., LoopbackGrid], make_nodes: Callable[[LoopbackGrid], Nodes]
) -> None:
    rows: dict[str, int] = {}
    grid = make_grid(forged(lambda party: json.dumps({**party, **rows})))
    known = make_nodes(grid)
    parties = known.gather((), 2, 5)
    known.close(parties)
    known.gather((), 2, 0)
    assert grid.delivered.count(("query.identity", SECOND)) == 1, "nobody who stays is asked twice"
    rows["train_rows"] = 99
    grid.started[SECOND] = "later"
    assert list(known.gather((), 2, 0)) == [NAMES[0]]
    assert any("the rows of client 'birch-2' changed" in refusal for refusal in known.refusals)
    rows.clear()
    grid.started[SECOND] = "later still"
    assert known.gather((), 2, 5) == parties and not known.refusals


def test_a_name_that_is_taken_can_be_used_when_its_holder_has_left(
    make_grid: Callable[..., LoopbackGrid],
    make_nodes: Callable[[LoopbackGrid], Nodes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nodes, "_AGAIN_SECONDS", 0.0)
    grid = make_grid()
    known = make_nodes(grid)
    known.gather((), 2, 5)
    grid.nodes[SECOND + 1] = grid.nodes[
        SECOND
    ]  # restarted without a key: the former id stays for a while
    known.gather((), 3, 0)
    assert any(
        "a node called 'birch-2' is connected already" in refusal for refusal in known.refusals
    )
    del grid.nodes[SECOND]
    assert set(known.gather((), 2, 5)) == set(NAMES) and not known.refusals


HUGE = 10**400


@pytest.mark.parametrize(
    ("kind", "change", "stage", "reason"),
    [
        ("train", {"metric:loss": HUGE}, "reply", "beyond the largest float"),
        ("train", {"parts": "[" * 100_000}, "reply", "JSON list of names"),
        ("train", {"num_examples": 10**18}, "reply", "10^18 or more training rows"),
        ("train", {"num_examples": 10_000}, "screen", "claims 10000 training rows, and had"),
        ("train", {"metric:loss": 1e300}, "reply", "must be from -1e+06 to 1e+06"),
        ("train", {"kind": "failure", "stage": "x", "reason": "\x1b" * 10**6}, "x", "\\x1b"),
        ("evaluate.losses", {"total": 1e300}, "evaluate", "nats a token; must be at most"),
        ("evaluate.losses", {"tokens": 10**15}, "evaluate", "at the start it said that it has"),
        ("evaluate.losses", {"tokens": float("nan")}, "evaluate", "must be a whole number"),
        ("evaluate.losses", {"tokens": 0}, "evaluate", "no response tokens"),
        ("evaluate.losses", {"total": "low"}, "evaluate", "must be a number"),
        ("evaluate.choice", {"chosen": 0.3}, "evaluate", "the node chose 0.3; it was offered"),
    ],
)
def test_an_answer_with_impossible_numbers_is_a_failure_and_the_run_goes_on(
    kind: str,
    change: dict[str, Any],
    stage: str,
    reason: str,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
) -> None:
    settings = {
        "federation.nodes": 3,
        "federation.wait_s": 5,
        "federation.reply_s": 5,
        "rounds.count": 2,
        "graph.kind": "uniform",
    }
    config = make_config(
        base_folder, clients_folder, {**settings, "algorithm.safeguard": kind == "evaluate.choice"}
    )

    def meddle(client: str, message: Message, reply: Message) -> Message:
        if client != NAMES[1] or message.metadata.message_type != kind:
            return reply
        encoded = unpack(bytes_of(reply.content))
        return Message(
            record_of(pack(Encoded(encoded.arrays, {**encoded.header, **change}))), reply_to=message
        )

    of = {"data-path": str(clients_folder), "memory": str(tmp_path / "memory")}
    grid = LoopbackGrid(
        config,
        {FIRST + i: {"name": name, **of} for i, name in enumerate((*NAMES, "apple-2"))},
        meddle,
    )
    run_federation(config, grid, tmp_path / "run", resume=False)
    failures = events_of(tmp_path / "run", "failure")
    assert failures and {(failure["client"], failure["stage"]) for failure in failures} == {
        (NAMES[1], stage)
    }
    assert all(reason in failure["reason"] for failure in failures)
    assert (tmp_path / "run" / "report.html").is_file()
