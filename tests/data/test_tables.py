"""Tables as people save them: delimiters, encodings, quotation marks, packed files, broken ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fedmira.config import DataSettings
from fedmira.data import Example, Reading
from fedmira.data.problems import Problems
from fedmira.data.sources.hub import read as read_hub
from fedmira.data.sources.jsonl import read as read_own
from fedmira.data.tables import read_table
from fedmira.errors import DataError


def rows(path: Path, data: bytes) -> tuple[list[dict[str, object]], list[str], str]:
    path.write_bytes(data)
    problems, notes = Problems(), []  # type: ignore[var-annotated]
    found = [dict(row) for _, row in read_table(path, problems, notes)]
    try:
        problems.raise_if_any()
    except DataError as error:
        return found, notes, str(error)
    return found, notes, ""


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_delimiter_and_encoding_are_found_and_said(
    tmp_path: Path, delimiter: str, encoding: str
) -> None:
    text = "instruction{0}output\r\nS\u00e4ge, ja?{0}None\r\nb{0}007\r\n".replace(
        "S\u00e4ge, ja?", '"S\u00e4ge, ja?"'
    ).replace("{0}", delimiter)
    found, notes, problem = rows(tmp_path / "a.csv", text.encode(encoding))
    assert not problem
    assert found == [
        {"instruction": "S\u00e4ge, ja?", "output": "None"},
        {"instruction": "b", "output": "007"},
    ]
    assert any("parts the cells" in note for note in notes) == (delimiter != ",")
    assert any(encoding in note for note in notes) == (encoding in ("utf-16", "cp1252"))


def test_quotation_marks_of_a_tsv_are_characters_unless_a_writer_of_tables_put_them(
    tmp_path: Path,
) -> None:
    found, notes, _ = rows(tmp_path / "a.tsv", b'q\ta\n"one\tx\n"two\ty\n"three"\tz\n')
    assert [row["q"] for row in found] == ['"one', '"two', '"three"'] and "characters" in notes[0]
    found, _, _ = rows(tmp_path / "a.tsv", b'q\ta\n"say ""hi""\nthere"\tx\n')
    assert found == [{"q": 'say "hi"\nthere', "a": "x"}]


def test_an_index_without_a_name_is_not_looked_at(tmp_path: Path) -> None:
    assert rows(tmp_path / "a.csv", b",q,a\n0,x,y\n")[0] == [{"q": "x", "a": "y"}]


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.json", b"null", "holds null"),
        ("a.json", b"[1]", "is of type int"),
        ("a.jsonl.gz", b"\x1f\x8b", "cannot be unpacked"),
        ("a.csv.gz", b"plain", "cannot be unpacked"),
        ("a.parquet", b"PAR1....PAR1", "parquet"),
        ("a.parquet", b"", "is no parquet file"),
        ("a.csv", b'q,a\n"x,y\n', "line 2"),
        ("a.csv", b"q,a\nx,y,z\n", "has 3 cells, the heading has 2"),
    ],
)
def test_broken_tables_are_problems(tmp_path: Path, name: str, data: bytes, problem: str) -> None:
    assert problem in rows(tmp_path / name, data)[2]


def mixed(folder: Path) -> Reading:
    """Five parties with files of five kinds."""
    folder.mkdir()
    lines = range(12)
    (folder / "Nord.csv").write_text(
        "instruction;output\n" + "".join(f"Gr\u00fc\u00dfe {j};ja\n" for j in lines),
        encoding="utf-8-sig",
    )
    (folder / "S\u00fcd West.CSV").write_text(
        "question,answer\n" + "".join(f"Stra\u00dfe {j},ja\n" for j in lines), encoding="cp1252"
    )
    chat = [
        {
            "messages": [
                {"role": "system", "content": "R\u00e9ponds en fran\u00e7ais."},
                {"role": "user", "content": f"\u00c7a va {j} ?"},
                {"role": "assistant", "content": "Oui."},
            ]
        }
        for j in lines
    ]
    (folder / "est.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in chat), encoding="utf-8"
    )
    asked = [{"question": f"Why {j}?", "context": f"c{j}", "answer": j} for j in lines]
    with gzip.open(folder / "west.jsonl.gz", "wt", encoding="utf-8") as handle:
        handle.write("\n".join(map(json.dumps, asked)))
    table = pyarrow.table({"prompt": [f"p {j}" for j in lines], "completion": ["c"] * 12})
    pyarrow.parquet.write_table(table, folder / "hafen.parquet")
    (folder / "README.md").write_text("x", encoding="utf-8")
    return read_own(DataSettings(source="jsonl", path=str(folder)), 0)


def test_a_mixed_folder_of_five_parties_needs_no_conversion(tmp_path: Path) -> None:
    reading = mixed(tmp_path / "rows")
    assert {task.name: len(task.examples) for task in reading.tasks} == dict.fromkeys(
        ["Nord", "S\u00fcd West", "est", "hafen", "west"], 12
    )
    by_name = {task.name: task.examples[0] for task in reading.tasks}
    assert by_name["west"] == Example("Why 0?", "c0", "0")
    assert by_name["S\u00fcd West"].instruction == "Stra\u00dfe 0"
    assert by_name["est"].messages[0] == ("system", "R\u00e9ponds en fran\u00e7ais.")
    assert any("README.md" in line for line in reading.skipped)
    assert any("cp1252" in note for note in reading.notes)


def test_a_folder_with_a_test_file_uses_it(tmp_path: Path) -> None:
    for part in ("train", "test"):
        text = "client,instruction,output\n" + "".join(f"a,{part} {j},None\n" for j in range(6))
        (tmp_path / f"{part}.csv").write_text(text, encoding="utf-8")
    for source, read in (("hub", read_hub), ("jsonl", read_own)):
        (task,) = read(DataSettings(source=source, path=str(tmp_path)), 0).tasks
        assert [row.instruction for row in task.test or ()] == [f"test {j}" for j in range(6)]
        assert task.examples[0] == Example("train 0", "", "None")
