"""Tokens of the same texts and tokenizer are read back; anything else is tokenised."""

from __future__ import annotations

import io
import logging
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.templates import byte_tokenizer
from fedmira.config import DataSettings, cache_folder
from fedmira.data import load_clients, token_cache
from fedmira.data.token_cache import TokenCache
from tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def _short_texts_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_LEAST_CHARACTERS", 0)


def counted(calls: list[Sequence[str]], texts: Sequence[str]) -> list[list[int]]:
    calls.append(texts)
    return [[len(text), *map(ord, text)] for text in texts]


@given(st.lists(st.text(max_size=8), min_size=1, max_size=5))
def test_what_was_tokenised_once_is_read_back(texts: list[str]) -> None:
    calls: list[Sequence[str]] = []
    cache = TokenCache(tiny_tokenizer())
    first = cache.ids(texts, lambda asked: counted(calls, asked))
    assert cache.ids(texts, lambda asked: counted(calls, asked)) == first == counted([], texts)
    assert len(calls) <= 1


def test_other_texts_and_other_tokenizers_are_tokenised_anew(tmp_path: Path) -> None:
    calls: list[Sequence[str]] = []
    other = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    for tokenizer in (tiny_tokenizer(), PreTrainedTokenizerFast(tokenizer_object=other)):
        for texts in (["ab", "c"], ["a", "bc"], ["abc"]):
            TokenCache(tokenizer, tmp_path / "tokens").ids(
                texts, lambda asked: counted(calls, asked)
            )
    assert len(calls) == 6


def test_a_file_cut_short_is_made_anew(tmp_path: Path) -> None:
    cache = TokenCache(tiny_tokenizer(), tmp_path / "tokens")
    expected = cache.ids(["abc"], lambda texts: counted([], texts))
    (path,) = (tmp_path / "tokens").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(path.read_bytes()[:-3])
    calls: list[Sequence[str]] = []
    assert cache.ids(["abc"], lambda texts: counted(calls, texts)) == expected
    assert calls == [["abc"]]


@given(st.data())
def test_a_file_with_any_byte_changed_is_said_to_be_damaged_and_made_anew(
    data: st.DataObject,
) -> None:
    with tempfile.TemporaryDirectory() as place, capturing() as said:
        cache = TokenCache(tiny_tokenizer(), Path(place) / "tokens")
        expected = cache.ids(["abc", "d"], lambda texts: counted([], texts))
        (path,) = (Path(place) / "tokens").iterdir()
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        calls: list[Sequence[str]] = []
        assert cache.ids(["abc", "d"], lambda texts: counted(calls, texts)) == expected
        assert calls == [["abc", "d"]] and path.name in said.getvalue()
        cache.ids(["abc", "d"], lambda texts: counted(calls, texts))
        assert len(calls) == 1, "what was made anew is kept"


def test_the_whole_file_of_other_texts_does_not_pass_for_these(tmp_path: Path) -> None:
    cache = TokenCache(tiny_tokenizer(), tmp_path / "tokens")
    cache.ids(["abc"], lambda texts: counted([], texts))
    (path,) = (tmp_path / "tokens").iterdir()
    cache.ids(["other"], lambda texts: counted([], texts))
    (other,) = set((tmp_path / "tokens").iterdir()) - {path}
    path.write_bytes(other.read_bytes())
    assert cache.ids(["abc"], lambda texts: counted([], texts)) == counted([], ["abc"])


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize("inner", [False, True])
def test_a_folder_that_others_can_write_to_is_not_trusted(
    inner: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FEDMIRA_CACHE", str(tmp_path))
    folder = tmp_path / "tokens" if inner else tmp_path
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    calls: list[Sequence[str]] = []
    for _ in range(2):
        TokenCache(tiny_tokenizer()).ids(["abc"], lambda texts: counted(calls, texts))
    assert len(calls) == 2 and not list(tmp_path.rglob("*.tokens"))
    assert "everybody can write there" in caplog.text and str(folder) in caplog.text


@contextmanager
def capturing() -> Iterator[io.StringIO]:
    """What the package logs within the block."""
    said = io.StringIO()
    handler, log = logging.StreamHandler(said), logging.getLogger("fedmira")
    log.addHandler(handler)
    try:
        yield said
    finally:
        log.removeHandler(handler)


def test_old_files_make_room_for_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_MOST_BYTES", 2000)
    for number in range(9):
        TokenCache(tiny_tokenizer(), tmp_path / "tokens").ids(
            [f"{number}" * 100], lambda texts: counted([], texts)
        )
    assert sum(path.stat().st_size for path in (tmp_path / "tokens").iterdir()) <= 2000
    calls: list[Sequence[str]] = []
    TokenCache(tiny_tokenizer(), tmp_path / "tokens").ids(
        ["8" * 100], lambda texts: counted(calls, texts)
    )
    assert not calls


def test_the_cache_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMIRA_CACHE", "off")
    assert cache_folder() is None
    calls: list[Sequence[str]] = []
    for _ in range(2):
        TokenCache(tiny_tokenizer()).ids(["abc"], lambda texts: counted(calls, texts))
    assert len(calls) == 2


def test_clients_are_the_same_with_and_without_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    for folder in ("off", str(tmp_path), str(tmp_path)):
        monkeypatch.setenv("FEDMIRA_CACHE", folder)
        loaded.append(load_clients(DataSettings(clients=2, max_rows=4), 0, byte_tokenizer()))
    assert loaded[0] == loaded[1] == loaded[2]
    assert any((tmp_path / "tokens").iterdir())


def test_few_characters_are_not_worth_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_LEAST_CHARACTERS", 10)
    cache = TokenCache(tiny_tokenizer(), tmp_path / "tokens")
    cache.ids(["123456789"], lambda texts: counted([], texts))
    assert not (tmp_path / "tokens").exists()
    cache.ids(["1234567890"], lambda texts: counted([], texts))
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_a_full_disk_leaves_the_run_alone(tmp_path: Path) -> None:
    """A file stands where the folder would be made."""
    (tmp_path / "tokens").write_text("", encoding="utf-8")
    cache = TokenCache(tiny_tokenizer(), tmp_path / "tokens")
    assert cache.ids(["abc"], lambda texts: counted([], texts)) == counted([], ["abc"])


def test_how_special_tokens_are_split_belongs_to_the_key(tmp_path: Path) -> None:
    calls: list[Sequence[str]] = []
    for split in (False, True):
        tokenizer = tiny_tokenizer()
        tokenizer.split_special_tokens = split
        TokenCache(tokenizer, tmp_path / "tokens").ids(["abc"], lambda texts: counted(calls, texts))
    assert len(calls) == 2
