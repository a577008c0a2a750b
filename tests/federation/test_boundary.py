"""Nothing of a node's rows, files and folders leaves it, whatever a server sends.

Marked words stand in rows, in their keys, in names of files and folders, and in the node's own
settings. All that would leave is searched for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedmira.config import Config, flattened
from fedmira.errors import RunError
from fedmira.federation.codes import NodeError
from fedmira.federation.guard import GuardedNode
from fedmira.federation.node import NodeSettings
from fedmira.federation.policy import NodePolicy, admitted, is_own, read_policy
from fedmira.federation.release import released
from fedmira.messages import Payload, Request
from fedmira.wire import (
    CHOICE,
    IDENTITY,
    LOSSES,
    SCORES,
    TRAIN,
    Encoded,
    Line,
    encode,
    encode_request,
    pack,
    unpack,
)
from small import make_config

MARK = "Zq7marker"
KINDS = (IDENTITY, TRAIN, LOSSES, CHOICE, SCORES, "query.refusal", "query.nonsense")
SCHEMA = sorted({*flattened(Config()), "data.columns.output", "data.sha256", "algorithm.space"})


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> dict[str, Any]:
    """The config of a node whose words, wherever they stand, are marked."""
    place = tmp_path_factory.mktemp("boundary") / f"{MARK}-folder"
    rows = place / f"{MARK}-rows" / f"{MARK}-client"
    rows.mkdir(parents=True)
    lines = [
        {
            f"{MARK}-question": f"w{i} w{i + 1} {MARK} {i}",
            "output": f"{MARK} w{i}",
            "category": f"{MARK}-category-{i % 3}",
            f"{MARK}-column": f"{MARK}-value-{i}",
        }
        for i in range(30)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (rows / "train.jsonl").write_text(text, encoding="utf-8")
    (rows / f"{MARK}-notes.txt").write_text(f"{MARK} notes\n", encoding="utf-8")
    secret = place / f"{MARK}-secret.txt"
    secret.write_text(f"{MARK} in a file that is nobody's rows\n", encoding="utf-8")
    policy = place / "policy.toml"
    policy.write_text(
        f'[data]\nsource = "jsonl"\nignore = ["{MARK}-column"]\n'
        f'columns = {{input = "{MARK}-question"}}\n',
        encoding="utf-8",
    )
    policy.chmod(0o600)
    return {
        "name": "apple-1",
        "data-path": str(place / f"{MARK}-rows"),
        "base": str(base_folder),
        "device": "cpu",
        "memory": str(place / f"{MARK}-memory"),
        "policy": str(policy),
    }


def shared(base: Path) -> dict[str, object]:
    """What an app of this fedmira sends to a node."""
    config = make_config(base, "", {"data.source": "demo"})
    return {key: value for key, value in flattened(config).items() if not is_own(key)}


def left(
    guard: GuardedNode,
    node: Mapping[str, object],
    sent: Mapping[str, object],
    kind: str,
    content: bytes,
) -> bytes:
    """All bytes that leave the node for a message, an error's text where there is no answer."""
    try:
        return guard.answer(node, sent, kind, content)
    except NodeError as error:
        return error.told.encode()


def question(kind: str, header: Mapping[str, Any]) -> bytes:
    adapter = {"layer.lora_A.weight": torch.zeros(2, 3)}
    if kind == TRAIN:
        request = Request("apple-1", 1, 7, Payload({"adapter": adapter}))
        message = encode_request(request, "float32", Line(), "0123456789abcdef")[0]
    else:
        message = encode(Payload({"adapter": adapter}), "float32", Line())[0]
    return pack(Encoded(message.arrays, {**message.header, **header}))


KEYS = st.one_of(
    st.sampled_from(SCHEMA),
    st.sampled_from(
        ["data", "model", "data.columns", "server-only.data.path", " data.path", "a=b"]
    ),
    st.text(max_size=12),
)
VALUES = st.one_of(
    st.sampled_from(
        [
            "jsonl",
            "hub",
            "column",
            "object",
            "{source = 'hub', path = '/'}",
            "[1]\n[data]\nsource = 'hub'",
            "../..",
            "chat",
            "cpu",
            "output",
            "fedavg",
            10**400,
            float("nan"),
            -1,
            0,
            1,
            2,
            True,
            "",
        ]
    ),
    st.integers(-3, 40),
    st.floats(),
    st.text(max_size=20),
    st.just(f"/{MARK[:3]}"),
)
HEADERS = st.dictionaries(
    st.sampled_from(["split", "max_new_tokens", "client", "round", "run", "wire", "parts", "kind"]),
    st.one_of(st.sampled_from(["test", "train", "validation", "../x", "[]"]), st.integers(-1, 99)),
    max_size=3,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.dictionaries(KEYS, VALUES, max_size=3), kind=st.sampled_from(KINDS), header=HEADERS
)
@example(changes={}, kind=IDENTITY, header={})
@example(changes={}, kind=TRAIN, header={})
@example(changes={"data.source": "hub", "data.partition": "column"}, kind=IDENTITY, header={})
@example(changes={"data.column": "category", "data.clients": 99}, kind=IDENTITY, header={})
@example(changes={"data.max_rows": 1}, kind=IDENTITY, header={})
@example(changes={"data.max_length": 8, "data.bad_rows": "error"}, kind=IDENTITY, header={})
@example(changes={"data.prompt": "chat"}, kind=IDENTITY, header={})
@example(changes={"data.split_list": "/etc/passwd"}, kind=IDENTITY, header={})
@example(changes={"model.base": "/etc"}, kind=IDENTITY, header={})
def test_no_setting_and_no_message_brings_a_marked_word_out(
    changes: dict[str, Any],
    kind: str,
    header: dict[str, Any],
    marked: dict[str, Any],
    base_folder: Path,
) -> None:
    sent = {**shared(base_folder), **changes}
    found = left(GuardedNode(), marked, sent, kind, question(kind, header))
    assert found and MARK.encode() not in found


def test_what_a_marked_node_does_is_training_all_the_same(
    marked: dict[str, Any], base_folder: Path
) -> None:
    """So that silence in the test above is not that of a node which answers nothing."""
    guard, sent = GuardedNode(), shared(base_folder)
    answer = unpack(guard.answer(marked, sent, IDENTITY, pack(Encoded({}, {}))))
    party = json.loads(str(answer.header["party"]))
    assert (party["client_id"], party["task"], party["category"]) == ("apple-1", "", "")
    assert party["train_rows"] == 18 and party["test_rows"] == 6, "0.6 and 0.2 of 30 rows"
    node = guard._built.node if guard._built else None
    assert node is not None
    start = node._clients.kind.starts({"apple-1": 4}, 0)["apple-1"]
    request = Request("apple-1", 1, 7, Payload({"adapter": start}))
    message = pack(encode_request(request, "float32", Line(), "0123456789abcdef")[0])
    reply = guard.answer(marked, sent, TRAIN, message)
    assert unpack(reply).header["kind"] == "reply" and MARK.encode() not in reply
    log = Path(marked["memory"]) / "apple-1.log"
    before = log.read_text(encoding="utf-8") if log.exists() else ""
    told = left(guard, {**marked, "data-path": "/nowhere"}, sent, IDENTITY, message)
    assert told.decode().startswith("code data (1 problem)")
    assert "'/nowhere' does not exist" in log.read_text(encoding="utf-8").removeprefix(before)


@pytest.mark.parametrize("key", [key for key in SCHEMA if is_own(key)])
def test_a_key_of_the_nodes_own_is_refused_by_name_whatever_its_value(
    key: str, base_folder: Path
) -> None:
    own = {"model.base": str(base_folder), "data.source": "jsonl", "data.path": "/rows"}
    told = set()
    for value in (own.get(key, ""), "jsonl", 1, "{}"):
        with pytest.raises(RunError) as caught:
            admitted(NodePolicy(), {**shared(base_folder), key: value}, own)
        told.add(str(caught.value))
    (text,) = told
    assert text.startswith(f"policy: the server may not choose {key};")


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("rounds.count", 1001, "limits.most_rounds"),
        ("local.batch_size", 3, "limits.least_batch"),
        ("evaluation.max_new_tokens", 513, "limits.most_new_tokens"),
        ("algorithm.name", "of-a-stranger", "limits.methods"),
        ("algorithm.method", "object", "limits.methods"),
    ],
)
def test_a_value_beyond_a_limit_is_refused_by_key_and_limit(
    key: str, value: object, limit: str, base_folder: Path
) -> None:
    with pytest.raises(RunError, match=f"{key.removesuffix('method')}.*{limit}"):
        admitted(NodePolicy(), {**shared(base_folder), key: value}, {})


def test_what_the_node_has_said_itself_stays(base_folder: Path) -> None:
    policy = NodePolicy(data={"prompt": "chat"})
    with pytest.raises(RunError, match=r"may not choose data\.prompt;"):
        admitted(policy, shared(base_folder), {})
    config = admitted(policy, {**shared(base_folder), "data.prompt": "chat"}, {})
    assert config.data.prompt == "chat"


def test_a_key_that_the_server_may_not_choose_has_its_default(base_folder: Path) -> None:
    sent = {**shared(base_folder), "federation.open": True}
    assert admitted(NodePolicy(), sent, {}).federation.open is True
    keys = [key for key in NodePolicy().server_may_choose if key != "federation.*"]
    named = ("federation.clients", "federation.nodes", "federation.wait_s", "federation.reply_s")
    closed = NodePolicy(server_may_choose=(*keys, *named))
    with pytest.raises(RunError, match=r"may not choose federation\.open;"):
        admitted(closed, sent, {})
    assert admitted(closed, shared(base_folder), {}).federation.open is False


def test_limits_hold_on_the_rows_that_are_there() -> None:
    policy = NodePolicy()
    policy.check_size(8, 256, 1000)
    for size, limit in (((7, 1, 1), "rows"), ((8, 257, 1), "rank"), ((8, 1, 1001), "steps")):
        with pytest.raises(RunError, match=f"limits.(least|most)_{limit}"):
            policy.check_size(*size)


def test_every_section_of_the_schema_is_shared_or_the_nodes_own_by_name() -> None:
    """A new section is the node's own until somebody decides otherwise in policy.py."""
    kept = {"data", "model"}
    sections = {name for name in Config.model_fields if name not in kept}
    assert {name for name in sections if is_own(name if name == "seed" else f"{name}.x")} == set()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('server_may_choose = ["data.path"]', "data.path is always the node's own"),
        ('server_may_choose = ["*"]', r"\* is always the node's own"),
        ("[data]\nsuorce = 'hub'", "'suorce' is no key of"),
        ("[limits]\nleast_rows = 0", "limits.least_rows"),
        ("[limit]\nleast_rows = 8", "limit: Extra inputs"),
        ("not toml", "cannot be read"),
        ('[tells]\ntask = "a\\u001b"', "tells.task"),
    ],
)
def test_a_policy_that_is_wrong_is_an_error(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(Exception, match=problem):
        read_policy(path)


def test_a_policy_that_others_may_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("", encoding="utf-8")
    path.chmod(0o622)
    with pytest.raises(Exception, match="written by nobody else"):
        read_policy(path)


def test_the_policy_is_found_beside_the_rows(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    node = NodeSettings("a", data_path=str(tmp_path / "rows"))
    assert node.policy_path is None
    (tmp_path / "policy.toml").write_text("", encoding="utf-8")
    assert node.policy_path == tmp_path / "policy.toml"
    assert NodeSettings("a", policy="/other.toml").policy_path == Path("/other.toml")


@pytest.mark.parametrize(
    ("kind", "header"),
    [
        (LOSSES, {"total": "1.0", "tokens": 3}),
        (LOSSES, {"total": 1.0, "tokens": 3, "note": 1}),
        (CHOICE, {"chosen": "w1"}),
        (SCORES, {"rouge_l": 0.5, "answer": "w1"}),
        (IDENTITY, {"base": "of rows"}),
        (TRAIN, {"kind": "reply", "metric:loss": "w1"}),
        (TRAIN, {"kind": "reply", "parts": '["a\\n"]'}),
        ("query.nonsense", {"total": 1.0}),
    ],
)
def test_a_field_that_is_not_listed_does_not_leave(kind: str, header: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="may not leave this node"):
        released(kind, Encoded({}, header), "apple-1", NodePolicy().tells)


def test_the_name_of_another_client_or_a_word_of_rows_in_the_summary_does_not_leave(
    base_folder: Path, clients_folder: Path
) -> None:
    from fedmira.experiment import build_experiment

    experiment = build_experiment(make_config(base_folder, clients_folder))
    party = experiment.parties["apple-1"]
    assert party.category == "apple", "the source gives one, and the operator has not"
    about = {field: getattr(party, field) for field in party.__dataclass_fields__} | {"task": ""}
    with pytest.raises(RunError, match="'category' may not leave"):
        released(IDENTITY, Encoded({}, {"party": json.dumps(about)}), "apple-1", NodePolicy().tells)
