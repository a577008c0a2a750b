"""Data sets of the hub, through local folders: no test here needs a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedmira.config import DataSettings
from fedmira.data.sources.hub import read
from fedmira.errors import DataError

datasets = pytest.importorskip("datasets")

ROWS = [
    {"client": name, "instruction": "Do.", "input": str(i), "output": "done", "category": "k"}
    for i, name in enumerate("bab")
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def options(path: Path | str, **keys: Any) -> DataSettings:
    return DataSettings(source="hub", path=str(path), **keys)


def test_a_saved_table_is_grouped_by_its_client_column(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    tasks = read(options(tmp_path / "saved"), 0).tasks
    assert [(task.name, task.category, [row.input for row in task.examples]) for task in tasks] == [
        ("b", "k", ["0", "2"]),
        ("a", "k", ["1"]),
    ]
    assert tasks[1].examples[0].where == f"{tmp_path}/saved[train] row 2"


def test_a_saved_table_with_splits(tmp_path: Path) -> None:
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "extra": datasets.Dataset.from_list(ROWS[:1])}
    ).save_to_disk(tmp_path)
    assert len(read(options(tmp_path, split="extra"), 0).tasks) == 1
    with pytest.raises(DataError, match="no split 'test', found train, extra; set data.split"):
        read(options(tmp_path, split="test"), 0)


def test_a_folder_of_data_files(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    assert [task.name for task in read(options(folder), 0).tasks] == ["b", "a"]
    with pytest.raises(DataError, match="no split 'nope', found train; set data.split"):
        read(options(folder, split="nope"), 0)


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet", "json", "jsonl"])
def test_one_file_on_disk(tmp_path: Path, ending: str) -> None:
    path, table = tmp_path / f"all.{ending}", datasets.Dataset.from_list(ROWS)
    if ending == "parquet":
        table.to_parquet(path)
    elif ending == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    else:
        table.to_csv(path, sep="," if ending == "csv" else "\t")
    tasks = read(options(path), 0).tasks
    assert [(task.name, [row.output for row in task.examples]) for task in tasks] == [
        ("b", ["done", "done"]),
        ("a", ["done"]),
    ]


def test_cells_of_a_csv_file_are_text(tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text(
        "client,instruction,input,output\n1,Do.,,None\n1,Do.,007,5\n", encoding="utf-8"
    )
    (task,) = read(options(tmp_path / "all.csv"), 0).tasks
    assert (task.name, [(row.input, row.output) for row in task.examples]) == (
        "1",
        [("", "None"), ("007", "5")],
    )


def test_a_file_that_cannot_be_a_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "all.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"all\.xlsx: hub reads \.jsonl, .* files, also with \.gz"):
        read(options(tmp_path / "all.xlsx"), 0)
    (tmp_path / "all.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="is no parquet file"):
        read(options(tmp_path / "all.parquet"), 0)


def test_messages_survive_the_table(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "o"}]
    datasets.Dataset.from_list([{"client": "a", "messages": turns}]).save_to_disk(tmp_path)
    (row,) = read(options(tmp_path), 0).tasks[0].examples
    assert (row.messages, row.output) == ((("user", "q"),), "o")


def test_row_problems_name_split_and_row(tmp_path: Path) -> None:
    datasets.Dataset.from_list(
        [*ROWS, {**ROWS[0], "output": None}, {**ROWS[0], "client": None}]
    ).save_to_disk(tmp_path)
    with pytest.raises(DataError) as error:
        read(options(tmp_path), 0)
    assert [problem.split(", found")[0] for problem in error.value.problems] == [
        f"{tmp_path}[train] row 4: missing key 'output' or 'response'",
        f"{tmp_path}[train] row 5: missing key 'client'",
    ]


def test_a_data_set_that_cannot_be_reached_is_named_with_the_way_out() -> None:
    with pytest.raises(
        DataError,
        match=r"data set 'nobody/no-such-set', split 'train', cannot be loaded \(.*; .*pass a "
        r"local data set folder",
    ):
        read(options("nobody/no-such-set"), 0)


def test_an_empty_path_and_an_empty_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.path is empty; hub needs a data set id"):
        read(options(""), 0)
    datasets.Dataset.from_dict({"client": [], "instruction": [], "output": []}).save_to_disk(
        tmp_path
    )
    with pytest.raises(DataError, match="split 'train' of this folder cannot be loaded"):
        read(options(tmp_path), 0)
