"""What Flower is handed by a node: no word of an error, whoever raised it."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr", reason="Flower is not installed; pip install 'fedmira[flower]'")

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedmira import flower_app
from fedmira.config import Config, flattened
from fedmira.errors import DataError
from fedmira.federation.audit import verify_audit
from fedmira.federation.codes import INTERNAL, code_text
from fedmira.federation.flower.records import record_of
from fedmira.federation.policy import is_own
from fedmira.federation.server import run_federation
from fedmira.wire import IDENTITY, REFUSAL, Encoded, pack
from loopback import LoopbackGrid
from small import lenient_node, make_config

MARK = "Zq7marker"


def asked(
    sent: Mapping[str, Any], node: Mapping[str, Any], kind: str = IDENTITY, content: bytes = b""
) -> Message:
    """A node's reply to a message, as Flower gets it."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    app = {"output": "", "resume": False, "simulation": False}
    context = Context(0, 1, {"resident": False, **node}, RecordDict(), {**app, **sent})
    message = Message(record_of(content or pack(Encoded({}, {}))), 1, kind)
    return flower_app.client_app(message, context)


def shared(config: Config) -> dict[str, Any]:
    return {key: value for key, value in flattened(config).items() if not is_own(key)}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError(MARK), INTERNAL),
        (OSError(2, MARK, f"/{MARK}"), INTERNAL),
        (MemoryError(MARK), INTERNAL),
        (DataError([MARK, MARK]), code_text("data", 2)),
    ],
    ids=["unforeseen", "machine", "memory", "ours"],
)
def test_an_errors_text_stays_and_its_code_travels(
    error: Exception,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> bytes:
        raise error

    monkeypatch.setattr(flower_app, "answer_here", fail)
    reply = asked({}, {"name": "apple-1", "memory": str(tmp_path)})
    assert reply.has_error() and reply.error.reason == told
    assert MARK in caplog.text, "the node's operator is told"


def test_a_refusal_that_cannot_be_read_is_no_error_of_flowers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reply = asked({}, {"name": "apple-1"}, REFUSAL, b"nonsense")
    assert not reply.has_error() and "without a reason that can be read" in caplog.text
    asked({}, {"name": "apple-1"}, REFUSAL, pack(Encoded({}, {"reason": "\x1b[31mred"})))
    assert "\\x1b[31mred" in caplog.text and "\x1b" not in caplog.text


def test_an_operators_node_reads_no_rows_that_a_simulation_names(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(base_folder, clients_folder)
    reply = asked(
        {**flattened(config), "simulation": True, "output": str(tmp_path)}, {"name": "apple-1"}
    )
    assert reply.has_error() and "this node is not simulated" in reply.error.reason


def test_what_is_the_servers_alone_is_not_looked_at(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(base_folder, clients_folder)
    node = {"name": "apple-1", "memory": str(tmp_path), **lenient_node(config, tmp_path)}
    own = {"server-only.data.source": "hub", "server-only.data.path": f"/{MARK}"}
    reply = asked({**shared(config), **own}, node)
    assert not reply.has_error(), reply.error.reason
    refused = asked({**shared(config), "data.source": "hub"}, node)
    assert refused.has_error() and "may not choose data.source;" in refused.error.reason


def test_both_ends_keep_the_same_messages(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(
        base_folder,
        clients_folder,
        {"federation.nodes": 2, "federation.wait_s": 30, "federation.reply_s": 30},
    )
    nodes = {
        i: {"name": name, "data-path": str(clients_folder), "memory": str(tmp_path / "memory")}
        for i, name in enumerate(("apple-1", "birch-1"))
    }
    run_federation(config, LoopbackGrid(config, nodes), tmp_path / "run", resume=False)
    server = verify_audit(tmp_path / "run-audit.jsonl")
    found = [
        verify_audit(tmp_path / "memory" / f"{of['name']}-audit.jsonl") for of in nodes.values()
    ]
    rounds = config.rounds.count
    assert all(each.messages["out", "train"] == rounds for each in found)
    assert server.messages["in", "train"] == 2 * rounds and not server.errors
    assert server.size["in", "train"] == sum(each.size["out", "train"] for each in found)
    assert {"adapter", "num_examples", "metric:loss"} <= set(found[0].left)
