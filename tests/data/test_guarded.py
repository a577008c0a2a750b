"""No file of rows ends the process, hangs it, or gives a traceback."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fedmira.config import DataSettings
from fedmira.data import guarded
from fedmira.data.problems import Problems
from fedmira.data.sources.hub import read as read_hub
from fedmira.data.tables import ENDINGS, read_table
from fedmira.errors import DataError


@pytest.fixture
def _another_reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A reader of its own, so that the others' goes on."""
    reader = guarded._Reader()
    monkeypatch.setattr(guarded, "_READER", reader)
    yield
    reader.end()


def parquet() -> bytes:
    turns = [{"role": "user", "content": "hi"}]
    columns = {
        "instruction": ["do it"] * 20,
        "output": [f"w{number}" for number in range(20)],
        "messages": [turns] * 20,
    }
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


@pytest.mark.usefixtures("_another_reader")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import os, sys; sys.stdin.buffer.readline(); os.kill(os.getpid(), 11)", "signal 11"),
        ("import os, sys; sys.stdin.buffer.readline(); os.abort()", "signal 6"),
        ("import time; time.sleep(60)", "not read within"),
        ("import sys; sys.exit(3)", "exit code 3"),
    ],
)
def test_a_file_that_ends_its_reader_is_a_problem_with_its_name(
    script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reader.py").write_text(script, encoding="utf-8")
    monkeypatch.setattr(guarded, "_SCRIPT", tmp_path / "reader.py")
    monkeypatch.setattr(guarded, "_SECONDS", 1.0)
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet())
    for _ in range(2):  # and the next file has a reader again
        problems = Problems()
        assert list(read_table(path, problems, [])) == []
        with pytest.raises(DataError, match=rf"rows\.parquet: .*{reason}"):
            problems.raise_if_any()


@pytest.mark.usefixtures("_another_reader")
def test_a_saved_data_set_that_ends_its_reader_is_a_problem_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reader.py").write_text("import os; os.abort()", encoding="utf-8")
    monkeypatch.setattr(guarded, "_SCRIPT", tmp_path / "reader.py")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}", encoding="utf-8")
    settings = DataSettings(source="hub", path=str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"saved: the data set cannot be read \(its reader ended"):
        read_hub(settings, 0)


def test_whole_files_are_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet())
    problems = Problems()
    assert len(list(read_table(path, problems, []))) == 20
    problems.raise_if_any()


def test_damaged_tables_of_every_ending_are_rows_or_problems(tmp_path: Path) -> None:
    """300 files: flipped bits, cuts, and content of another kind; nothing else is raised."""
    draw, whole = random.Random(0), parquet()
    line = b'{"instruction": "a", "output": "b"}\n'
    contents = (whole, line * 9, b"[" + line + b"]", b"instruction,output\na,b\n", b"null", b"3")
    contents += (b"[" * 5000, b"\x1f\x8b\x08", b"", b"\xff\xfe\x00", b'{"a": ' * 3000, b"1" * 5000)
    for number in range(300):
        content = bytearray(draw.choice(contents))
        for _ in range(draw.choice((0, 1, 4))):
            if content:
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        if draw.random() < 0.2:
            del content[draw.randrange(len(content) + 1) :]
        path = tmp_path / f"{number}{draw.choice(ENDINGS)}{draw.choice(('', '', '.gz'))}"
        path.write_bytes(content)
        problems = Problems()
        rows = list(read_table(path, problems, []))
        try:
            problems.raise_if_any()
        except DataError as error:
            assert path.name in str(error) and "\n" not in error.problems[0]
        else:
            assert all(isinstance(row, dict) for _, row in rows)
