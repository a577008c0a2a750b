"""A base is hashed once for the files that it is loaded from, and again when these are others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmira.adapters import content_hash
from fedmira.config import ModelSettings
from fedmira.model.base import hashing
from fedmira.model.base.hashing import base_hash, files_of
from fedmira.model.base.loading import read_base
from tiny import tiny_model


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    """A base of this test's own."""
    return Path(shutil.copytree(base_folder, tmp_path / "base"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was hashed, in a cache of this test's own that keeps the hash of any base."""
    made: list[str] = []

    def noted(state: Mapping[str, Tensor]) -> str:
        made.append(content_hash(state))
        return made[-1]

    monkeypatch.setattr(hashing, "content_hash", noted)
    monkeypatch.setattr(hashing, "_LEAST_BYTES", 0)
    monkeypatch.setenv("FEDMIRA_CACHE", str(tmp_path / "cache"))
    return made


def hash_of(folder: Path) -> str:
    return read_base(ModelSettings(base=str(folder), dtype="float32")).sha256


def test_the_same_files_are_hashed_once(folder: Path, hashed: list[str]) -> None:
    first, second = hash_of(folder), hash_of(folder)
    assert [first] == hashed and second == first


def test_other_weights_of_the_same_size_and_time_are_hashed_again(
    folder: Path, hashed: list[str]
) -> None:
    """A copy that keeps the times, as rsync makes it, still shows that the file was written."""
    first = hash_of(folder)
    path = folder / "model.safetensors"
    before = path.stat()
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = hash_of(folder)
    assert hashed == [first, second] and first != second


def test_a_damaged_file_of_hashes_is_said_and_made_anew(
    folder: Path, hashed: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = hash_of(folder)
    kept = tmp_path / "cache" / "base_hash.json"
    kept.write_text(kept.read_text(encoding="utf-8").replace(first, "0" * 64), encoding="utf-8")
    assert hash_of(folder) == first
    assert hashed == [first, first]
    assert "base_hash.json is damaged" in caplog.text and "hashed again" in caplog.text


def test_nothing_is_kept_without_a_cache(
    folder: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMIRA_CACHE", "off")
    assert hash_of(folder) == hash_of(folder)
    assert len(hashed) == 2


def test_a_small_base_is_hashed_each_time(
    folder: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_LEAST_BYTES", 2**28)
    assert hash_of(folder) == hash_of(folder)
    assert len(hashed) == 2


def test_files_that_change_while_a_base_is_loaded_say_nothing_of_it(hashed: list[str]) -> None:
    model = tiny_model("llama")
    for files, now in (("a", "b"), ("", ""), ("b", "b"), ("b", "b")):
        assert base_hash(model, files, now) == content_hash(model.state_dict())
    assert len(hashed) == 3


def test_a_hub_id_is_known_by_the_files_of_the_hub_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "try_to_load_from_cache", lambda name, file: str(folder / file))
    assert files_of("owner/name", "as stored") == files_of(str(folder), "as stored") != ""
    assert files_of("owner/name", "4bit") != files_of("owner/name", "as stored")
    monkeypatch.setattr(hashing, "try_to_load_from_cache", lambda name, file: None)
    assert files_of("owner/name", "as stored") == ""
