"""Files and folders are replaced whole or not at all, and leave nothing beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedmira.atomic import PARTIAL, replace_file, replace_folder


@pytest.mark.parametrize("lasting", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_a_file_takes_the_place_of_another(tmp_path: Path, lasting: bool, shared: bool) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b"old and longer")
    replace_file(path, "ä\n", lasting=lasting, shared=shared)
    assert path.read_bytes() == "ä\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_place_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    (path / "inside").mkdir(parents=True)  # a file cannot take the place of a folder
    with pytest.raises(OSError, match="taken"):
        replace_file(path, b"new")
    assert list(tmp_path.iterdir()) == [path] and (path / "inside").is_dir()


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_a_file_has_the_permissions_it_was_given_from_its_first_byte(tmp_path: Path) -> None:
    replace_file(tmp_path / "private", b"moments", mode=0o600)
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


def test_a_folder_takes_the_place_of_another_and_of_an_unfinished_one(tmp_path: Path) -> None:
    folder = tmp_path / "round-1"
    for old in (folder, tmp_path / f"round-1{PARTIAL}"):
        old.mkdir()
        (old / "old").write_bytes(b"")
    replace_folder(folder, {"values": b"1"})
    assert [path.name for path in tmp_path.iterdir()] == ["round-1"]
    assert [path.name for path in folder.iterdir()] == ["values"]


def test_the_writer_loads_no_heavy_library() -> None:
    code = "import sys, fedmira.atomic; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
