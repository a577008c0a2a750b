"""The folder of a node's socket is this user's alone, and so is the other end of it."""

from __future__ import annotations

import os
from multiprocessing.connection import Client, Listener
from pathlib import Path

import pytest

from fedmira.federation import sockets
from fedmira.federation.codes import NodeError, code_text
from fedmira.federation.sockets import check_peer, own_folder, peer_of


@pytest.fixture
def above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for what passes, which belongs to this user."""
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


def test_it_lies_in_the_runtime_folder_closed_to_others(above: Path) -> None:
    folder = own_folder()
    assert folder == above / f"fedmira-{os.getuid()}" == own_folder()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_no_link_is_followed(above: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (above / f"fedmira-{os.getuid()}").symlink_to(elsewhere)
    with pytest.raises(NodeError, match="cannot be used") as caught:
        own_folder()
    assert caught.value.told == code_text("node"), "a server learns nothing of folders"
    assert list(elsewhere.iterdir()) == []


def test_a_folder_that_others_may_enter_is_refused(above: Path) -> None:
    (above / f"fedmira-{os.getuid()}").mkdir()
    (above / f"fedmira-{os.getuid()}").chmod(0o755)
    with pytest.raises(NodeError, match="others may enter it .mode 755."):
        own_folder()


def test_a_folder_in_which_others_could_put_their_own_is_refused(above: Path) -> None:
    above.chmod(0o777)
    with pytest.raises(NodeError, match="others may rename what it holds"):
        own_folder()
    above.chmod(0o1777)
    assert own_folder().is_dir(), "as /tmp is: only the owner may rename"


@pytest.mark.skipif(os.getuid() != 0, reason="giving a folder to another user needs root")
def test_a_folder_of_another_user_is_refused(above: Path) -> None:
    folder = above / f"fedmira-{os.getuid()}"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, -1)
    with pytest.raises(NodeError, match="belongs to user 12345"):
        own_folder()


def test_the_other_end_is_this_user_and_another_one_is_refused(
    above: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(own_folder() / "a.socket")
    with Listener(place, "AF_UNIX") as listener, Client(place, "AF_UNIX") as line:
        with listener.accept() as other:
            assert peer_of(line) == peer_of(other) == os.getuid()
            check_peer(line)
            stranger = os.getuid() + 1
            monkeypatch.setattr(sockets.os, "getuid", lambda: stranger)
            with pytest.raises(NodeError, match=f"belongs to user {stranger - 1}, not {stranger}"):
                check_peer(other)
