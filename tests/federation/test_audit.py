"""The record of messages: its chain shows whatever is done to a line, and its summary what left."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmira.errors import RunFolderError
from fedmira.federation.audit import AuditLog, verify_audit
from fedmira.wire import Encoded, pack
from small import call_main

ADAPTER = {"adapter|a.weight": np.zeros((2, 3), np.float32), "adapter|b.weight": np.ones(4)}


def write(path: Path) -> list[bytes]:
    """Two requests, a reply and an error, by two processes that take turns; what travelled."""
    first, second = AuditLog(path), AuditLog(path)
    sent = [
        pack(Encoded(ADAPTER, {"round": 1, "client": "apple"})),
        pack(Encoded(ADAPTER, {"round": 1, "metric:loss": 0.25, "client": "apple"})),
        pack(Encoded(ADAPTER, {"round": 2, "client": "apple"})),
    ]
    first.add("in", "train", "server", sent[0])
    second.add("out", "train", "server", sent[1])
    first.add("in", "train", "server", sent[2])
    second.add_error("out", "train", "server", "code memory (1 problem)")
    return sent


def test_a_line_says_what_travelled_by_name_and_shape_and_no_content(tmp_path: Path) -> None:
    sent = write(tmp_path / "audit.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line["sha256"] for line in lines[:3]] == [
        hashlib.sha256(content).hexdigest() for content in sent
    ]
    assert [line["bytes"] for line in lines[:3]] == [len(content) for content in sent]
    assert lines[1]["fields"] == {"round": "number", "metric:loss": "number", "client": "text of 5"}
    part = lines[1]["parts"]["adapter"]
    assert (part["arrays"], part["numbers"]) == (2, 2 * 3 + 4)
    assert lines[0]["forms"][part["form"]] == {
        "a.weight": "float32 [2, 3]",
        "b.weight": "float64 [4]",
    }
    assert "forms" not in lines[1] and "forms" not in lines[2], "names and shapes stand once"
    assert lines[3]["error"] == "code memory (1 problem)"


def test_the_summary_counts_what_left(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    sent = write(path)
    found = verify_audit(path)
    assert found.lines == 4 and found.errors == 1 and found.peers == {"server"}
    assert found.size[("in", "train")] == len(sent[0]) + len(sent[2])
    assert found.left == {"round": 1, "metric:loss": 1, "client": 1, "adapter": 1, "error": 1}
    assert found.last == hashlib.sha256(path.read_bytes().splitlines()[-1]).hexdigest()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_changed_bit_breaks_the_chain(place: int, bit: int, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.unlink(missing_ok=True)
    write(path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(bytes(content))
    with pytest.raises(RunFolderError, match="line [1-5]: "):
        verify_audit(path)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: [lines[0], *lines[2:]], 2),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
        (lambda lines: [*lines, lines[-1]], 5),
    ],
    ids=["taken out", "out of order", "twice"],
)
def test_a_line_that_is_moved_is_named(change, line: int, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "audit.jsonl"
    write(path)
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    ended = call_main("audit", path)
    assert ended.code == 2 and f"line {line}: it does not follow" in ended.err


def test_a_line_that_a_power_cut_left_behind_is_named_and_the_record_goes_on(
    tmp_path: Path,
) -> None:
    path = tmp_path / "audit.jsonl"
    write(path)
    path.write_bytes(path.read_bytes()[:-20])
    AuditLog(path).add_error("out", "train", "server", "code run (1 problem)")
    assert len(path.read_bytes().splitlines()) == 5
    with pytest.raises(RunFolderError, match="line 4: it is not as it was written"):
        verify_audit(path)


def test_the_verb_prints_what_left(tmp_path: Path) -> None:
    write(tmp_path / "audit.jsonl")
    ended = call_main("audit", tmp_path / "audit.jsonl", "--json")
    assert ended.code == 0 and json.loads(ended.out)["left"]["metric:loss"] == 1
    shown = call_main("audit", tmp_path / "audit.jsonl")
    assert shown.code == 0 and "metric:loss" in shown.out and "the chain holds" in shown.err
    assert call_main("audit", tmp_path / "none.jsonl").code == 2
