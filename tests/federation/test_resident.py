"""A node's resident process answers as a node in this process does.

It survives errors, and starts again where it was killed.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmira.config import Config, flattened
from fedmira.errors import ConfigError, FedmiraError
from fedmira.federation.node import NodeSettings, read_node_settings
from fedmira.federation.policy import is_own
from fedmira.federation.resident import NodeError, answer_here, ask_resident
from fedmira.wire import (
    IDENTITY,
    Encoded,
    pack,
    unpack,
)
from small import make_config


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for sockets of this test alone, with a short name: a socket's has 108 bytes at most.

    A process that is left behind is ended by its id.
    """
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with tempfile.TemporaryDirectory(prefix="fm") as short:
        monkeypatch.setattr("tempfile.tempdir", short)
        yield Path(short) / f"fedmira-{os.getuid()}"
        for number in residents(Path(short)):
            os.kill(number, signal.SIGKILL)


def sent_by(config: Config) -> dict[str, object]:
    """The settings of an app, as its server sends them."""
    return {key: value for key, value in flattened(config).items() if not is_own(key)}


def node_in(folder: Path, base: Path, data: Path) -> dict[str, object]:
    """The config of a node with a handful of rows."""
    policy = folder / "policy.toml"
    policy.write_text("[limits]\nleast_rows = 1\nleast_measured = 1\n", encoding="utf-8")
    policy.chmod(0o600)
    return {
        "name": "apple-1",
        "data-path": str(data),
        "base": str(base),
        "memory": str(folder / "memory"),
        "policy": str(policy),
    }


def residents(folder: Path) -> list[int]:
    """Ids of the resident processes that listen in this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"fedmira.federation.resident" in words and any(
                word.startswith(str(folder).encode()) for word in words
            ):
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_it_answers_like_this_process_and_is_started_when_it_is_missing(
    place: Path, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = sent_by(make_config(base_folder, clients_folder))
    node = node_in(tmp_path, base_folder, clients_folder)
    question = pack(Encoded({}, {}))
    first = ask_resident(node, settings, IDENTITY, question)
    assert first == answer_here(node, settings, IDENTITY, question)
    assert json.loads(str(unpack(first).header["party"]))["client_id"] == "apple-1"
    (number,) = residents(place.parent)
    with pytest.raises(NodeError, match="a message of kind 'query.nonsense'"):
        ask_resident(node, settings, "query.nonsense", question)
    with pytest.raises(NodeError, match="'/nowhere' does not exist"):
        ask_resident({**node, "data-path": "/nowhere"}, settings, IDENTITY, question)
    assert residents(place.parent) == [number], "an error does not end it"
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)  # its socket is closed when it is gone altogether
    assert ask_resident(node, settings, IDENTITY, question) == first
    assert place.stat().st_mode & 0o077 == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_it_ends_when_it_works_longer_than_the_server_waits(
    place: Path, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = sent_by(make_config(base_folder, clients_folder))
    node = node_in(tmp_path, base_folder, clients_folder)
    with pytest.raises(
        NodeError, match="ended while it worked: no answer within federation.reply_s"
    ):
        ask_resident(
            node, {**settings, "federation.reply_s": 0.1}, IDENTITY, pack(Encoded({}, {}))
        )  # its base takes longer to load


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_any_name_finds_its_socket(
    place: Path, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = sent_by(make_config(base_folder, clients_folder))
    with pytest.raises(NodeError, match="none is called|cannot name a folder"):
        ask_resident(
            {**node_in(tmp_path, base_folder, clients_folder), "name": "clinic/north" * 20},
            settings,
            IDENTITY,
            pack(Encoded({}, {})),
        )


def test_a_node_config_is_checked_whole() -> None:
    assert read_node_settings({"name": "a", "data-path": "/d", "resident": False}) == NodeSettings(
        "a", "/d"
    )
    with pytest.raises(ConfigError) as caught:
        read_node_settings({"nmae": "a", "device": 1})
    assert [text.split(";")[0] for text in caught.value.problems] == [
        "node config: 'nmae' is unknown",
        "node config: device is 1",
        "node config: name is missing",
    ]


def test_what_a_node_cannot_do_is_an_error(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = sent_by(make_config(base_folder, clients_folder))
    with pytest.raises(FedmiraError, match="none is called 'cedar'"):
        answer_here(
            {**node_in(tmp_path, base_folder, clients_folder), "name": "cedar"},
            settings,
            IDENTITY,
            pack(Encoded({}, {})),
        )
