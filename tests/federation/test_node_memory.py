"""A client's memory on its node.

Survives restarts, never runs ahead of the server, and is never read where it is damaged.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedmira.adapters import digest
from fedmira.errors import RunFolderError
from fedmira.federation.node_memory import NodeMemory
from fedmira.messages import Payload


def adapter(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {f"m.{part}.weight": torch.randn(3, 2, generator=draw) for part in ("lora_B", "lora_A")}


def memory(number: int) -> Payload:
    return Payload(
        {"own.first": adapter(number), "empty": {}}, {"steps": float(number), "share": 0.1}
    )


def assert_is(found: Payload | None, number: int) -> None:
    assert found is not None and found.scalars == memory(number).scalars
    assert list(found.tensors) == ["own.first", "empty"] and digest(
        found.tensors["own.first"]
    ) == digest(adapter(number))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_what_was_kept_is_there_after_a_restart(tmp_path: Path) -> None:
    NodeMemory(tmp_path, "run-1", "north").keep(3, memory(3))
    for _ in range(2):
        assert_is(NodeMemory(tmp_path, "run-1", "north").recall(3), 3)


def test_other_users_of_the_machine_cannot_read_it(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        node = NodeMemory(tmp_path / "folder", "run", "clinic")
        node.keep(1, memory(1))
    finally:
        os.umask(before)
    assert [folder.stat().st_mode & 0o077 for folder in (node.folder, node.folder.parent)] == [0, 0]


def test_a_new_client_remembers_nothing_and_writes_nothing(tmp_path: Path) -> None:
    assert NodeMemory(tmp_path / "node", "run-1", "north").recall(0) is None
    assert NodeMemory(tmp_path / "node", "run-1", "north").recall(5) is None
    assert not (tmp_path / "node").exists()


def test_memory_of_a_reply_that_was_not_used_is_dropped_for_the_one_before(tmp_path: Path) -> None:
    node = NodeMemory(tmp_path, "run-1", "north")
    node.keep(2, memory(2))
    assert_is(node.recall(2), 2)
    node.keep(4, memory(4))  # its reply is lost, or the server dies before it counts
    assert_is(node.recall(2), 2)
    assert files(tmp_path) == ["round-000002.safetensors"]
    node.keep(5, memory(5))
    assert_is(node.recall(5), 5)
    assert files(tmp_path) == ["round-000002.safetensors", "round-000005.safetensors"]
    node.keep(7, memory(7))
    assert_is(node.recall(7), 7)
    assert files(tmp_path) == ["round-000005.safetensors", "round-000007.safetensors"]
    assert_is(node.recall(5), 5)  # the server went back to the checkpoint before its last
    assert node.recall(0) is None and files(tmp_path) == [], "no reply was ever accepted"


def test_the_last_two_lie_there_until_the_server_says_which_counts(tmp_path: Path) -> None:
    node = NodeMemory(tmp_path, "run-1", "north")
    node.keep(1, memory(1))
    node.recall(1)
    node.keep(2, memory(2))
    assert files(tmp_path) == ["round-000001.safetensors", "round-000002.safetensors"]


def test_an_older_memory_never_stands_for_the_accepted_one(tmp_path: Path) -> None:
    """The folder was put back from a copy: round 2 is there, the accepted round 5 is lost."""
    node = NodeMemory(tmp_path, "run-1", "north")
    node.keep(2, memory(2))
    assert node.recall(5) is None
    node.keep(6, memory(6))  # the client went on without it
    assert_is(node.recall(6), 6)


def test_a_restart_between_keeping_and_acceptance_finds_the_round_before(tmp_path: Path) -> None:
    for number in (1, 4):
        NodeMemory(tmp_path, "run-1", "north").keep(number, memory(number))
    assert_is(NodeMemory(tmp_path, "run-1", "north").recall(1), 1)


def test_only_its_own_files_are_read_and_removed(tmp_path: Path) -> None:
    node = NodeMemory(tmp_path, "run-1", "north")
    node.keep(3, memory(3))
    strangers = [
        "round-000003 copy.safetensors",
        "round-3.safetensors",
        "round-0000003.safetensors",
        "round-notes.safetensors",
        "mine.partial",
    ]
    for name in strangers:
        (node.folder / name).write_bytes(b"somebody else's")
    assert_is(node.recall(3), 3)
    assert files(tmp_path) == sorted(["round-000003.safetensors", *strangers])


def test_more_than_a_million_rounds(tmp_path: Path) -> None:
    node = NodeMemory(tmp_path, "run-1", "north")
    for number in (999_999, 1_000_000):
        node.keep(number, memory(number))
    assert_is(node.recall(1_000_000), 1_000_000)
    assert files(tmp_path) == ["round-1000000.safetensors", "round-999999.safetensors"]
    node.keep(1_000_001, memory(1_000_001))
    assert_is(node.recall(1_000_001), 1_000_001)
    assert files(tmp_path) == ["round-1000000.safetensors", "round-1000001.safetensors"]


def test_the_same_round_again_replaces_its_memory(tmp_path: Path) -> None:
    node = NodeMemory(tmp_path, "run-1", "north")
    node.keep(1, memory(1))
    node.keep(1, memory(9))
    assert_is(node.recall(1), 9)


def test_a_node_that_is_killed_while_it_writes_has_its_former_memory(tmp_path: Path) -> None:
    node = NodeMemory(tmp_path, "run-1", "north")
    node.keep(1, memory(1))
    whole = (node.folder / "round-000001.safetensors").read_bytes()
    (node.folder / "round-000002.safetensors.partial").write_bytes(whole[: len(whole) // 2])
    assert_is(NodeMemory(tmp_path, "run-1", "north").recall(1), 1)
    assert files(tmp_path) == ["round-000001.safetensors"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-3],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: b"",
        lambda data: data.replace(b"0.1", b"0.2"),
    ],
    ids=["cut short", "a bit flipped", "empty", "a number changed"],
)
def test_a_damaged_memory_is_an_error_that_names_the_file_and_the_way_out(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    node = NodeMemory(tmp_path, "run-1", "north")
    node.keep(1, memory(1))
    path = node.folder / "round-000001.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        RunFolderError,
        match=r"round-000001.safetensors: the client's private memory cannot be read \(.+\); put "
        r"the file back",
    ):
        node.recall(1)
    path.unlink()
    assert node.recall(1) is None, "as the message says, the client goes on without it"


def test_runs_and_clients_of_one_folder_do_not_mix(tmp_path: Path) -> None:
    names = [
        ("run-1", "north"),
        ("run-1", "south"),
        ("run-2", "north"),
        ("run-1", "../north"),
        ("run-1", ".."),
        ("run-1", "a/b c"),
        ("run-1", ""),
    ]
    for number, (run, client) in enumerate(names, start=1):
        NodeMemory(tmp_path / "node", run, client).keep(1, memory(number))
    for number, (run, client) in enumerate(names, start=1):
        assert_is(NodeMemory(tmp_path / "node", run, client).recall(1), number)
    assert files(tmp_path) == ["round-000001.safetensors"] * len(names)
    assert all((tmp_path / "node") in path.parents for path in tmp_path.rglob("*.safetensors")), (
        "no name leads out of the folder"
    )


def test_a_file_of_another_client_is_refused(tmp_path: Path) -> None:
    NodeMemory(tmp_path, "run-1", "south").keep(1, memory(1))
    north = NodeMemory(tmp_path, "run-1", "north")
    north.folder.mkdir(parents=True)
    (north.folder.parent / "south" / "round-000001.safetensors").rename(
        north.folder / "round-000001.safetensors"
    )
    with pytest.raises(RunFolderError, match="it belongs to run 'run-1', client 'south'"):
        north.recall(1)


def test_a_file_where_the_folder_should_be_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "node").write_text("in the way")
    with pytest.raises(
        RunFolderError, match=r"cannot be written \(.+\); make room or choose another folder"
    ):
        NodeMemory(tmp_path / "node", "run-1", "north").keep(1, memory(1))
