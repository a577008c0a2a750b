"""A source that is not in the package, by the entry point of another one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedmira.config.sources as table
from data.templates import byte_tokenizer
from fedmira.config import load_config
from fedmira.data import load_clients
from fedmira.errors import ConfigError

CODE = """
from fedmira.data import Example, RawTask, Reading

def read(settings, seed):
    rows = [Example("Repeat.", f"{settings.column} {n}", f"{n}") for n in range(10)]
    return Reading((RawTask("echo", "", rows),))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path in which a package with an entry point may lie."""
    monkeypatch.syspath_prepend(tmp_path)
    table._offered.cache_clear()
    yield tmp_path
    table._offered.cache_clear()
    sys.modules.pop("their_rows", None)


def install(folder: Path, line: str) -> None:
    """A distribution as pip leaves it."""
    (folder / "their_rows.py").write_text(CODE, encoding="utf-8")
    about = folder / "their_rows-1.0.dist-info"
    about.mkdir()
    metadata = "Metadata-Version: 2.1\nName: their-rows\nVersion: 1.0\n"
    (about / "METADATA").write_text(metadata, encoding="utf-8")
    (about / "entry_points.txt").write_text(f"[fedmira.sources]\n{line}\n", encoding="utf-8")


def test_a_source_of_another_package_is_read_by_its_name(folder: Path) -> None:
    install(folder, "echoes = their_rows:read")
    config = load_config(overrides=["data.source=echoes", "data.column=word"])
    (client,) = load_clients(config.data, config.seed, byte_tokenizer()).clients
    assert client.client_id == "echo"
    assert len(client.train) == 8, "train_fraction 0.8 of its ten rows"


def test_a_source_that_takes_our_name_is_refused(folder: Path) -> None:
    install(folder, "jsonl = their_rows:read")
    with pytest.raises(ConfigError, match="source 'jsonl' of their-rows .* the name is taken by"):
        table.source_names()


def test_an_unknown_source_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"must be one of demo, .* \(did you mean 'dolly'\?\)"):
        load_config(overrides=["data.source=doly"])
