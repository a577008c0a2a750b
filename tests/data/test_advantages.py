"""The key `advantage` of rows: read as a number, refused where it is none, and never silent."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fedmira.config import DataSettings
from fedmira.data import rows_from_objects
from fedmira.data.problems import Problems
from fedmira.data.rows import RowReader
from fedmira.errors import DataError
from fedmira.experiment import Experiment, build_experiment
from small import make_config, write_base

ROWS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"instruction": f"w{number} w{number + 1}", "output": f"w{50 + number}", **more}


def built(base: Path, folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Experiment:
    """An experiment on one client with these rows."""
    lines = "".join(json.dumps(each) + "\n" for each in rows)
    (folder / "north.jsonl").write_text(lines, encoding="utf-8")
    return build_experiment(make_config(base, folder, {"algorithm.name": "local", **settings}))


def read(row: dict[str, Any], **settings: Any) -> tuple[float | None, list[str]]:
    problems = Problems()
    reader = RowReader(
        DataSettings(source="jsonl", path="x", bad_rows="error", **settings), problems
    )
    example = reader.example(row, "f:1")
    problems.raise_if_any()
    assert example is not None
    return example.advantage, reader.finish()[1]


@pytest.mark.parametrize(
    ("value", "expected"), [(2, 2.0), (-0.5, -0.5), ("1.25", 1.25), ("", None), (None, None)]
)
def test_numbers_count_also_as_text_of_a_table(value: Any, expected: float | None) -> None:
    assert read(row(1, advantage=value)) == (expected, [])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan", "-inf", 10**400])
def test_a_number_that_is_not_finite_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(DataError, match=r"f:1: 'advantage' is (nan|inf|-inf); must be a finite"):
        read(row(1, advantage=value))


def test_what_is_no_number_is_told_and_not_guessed() -> None:
    assert read(row(1, advantage="cheap")) == (
        None,
        ["not read, their text reaches no model: advantage (1 rows)"],
    )
    assert read(row(1, advantage=True)) == (
        None,
        ["not read in 1 rows: 'advantage' is true or false, and no number"],
    )


def test_a_column_of_another_name_is_taken() -> None:
    assert read(row(1, gain=3), columns={"advantage": "gain"})[0] == 3.0


def test_nan_of_an_object_is_no_empty_cell() -> None:
    rows = rows_from_objects({"a": [row(1, advantage=float("nan"), note=float("nan"))]})
    settings = DataSettings(source="object", bad_rows="error")
    with pytest.raises(DataError, match="'advantage' is nan"):
        rows.reading(settings, 1)
    ((only,),) = (parts["train"] for parts in rows.parts.values())
    assert "note" not in only


def test_a_temperature_without_any_advantage_is_refused(base: Path, tmp_path: Path) -> None:
    rows = [row(i) for i in range(ROWS)]
    with pytest.raises(DataError, match="no training row has the key 'advantage'"):
        built(base, tmp_path, rows, **{"local.advantage_temperature": 1.0})


def test_rows_without_an_advantage_beside_others_are_told(base: Path, tmp_path: Path) -> None:
    rows = [row(i) if i % 2 else row(i, advantage=1.0) for i in range(ROWS)]
    experiment = built(base, tmp_path, rows, **{"local.advantage_temperature": 1.0})
    data = experiment.clients.data["north"]  # type: ignore[attr-defined]
    lacking = sum(each.advantage is None for each in data.train)
    assert 0 < lacking < len(data.train)
    assert (
        f"{lacking} of {len(data.train)} training rows have no advantage and are weighted as rows "
        "of advantage 0 (clients north)" in experiment.notes
    )


def test_advantages_that_nothing_reads_are_told(base: Path, tmp_path: Path) -> None:
    experiment = built(base, tmp_path, [row(i, advantage=1.0) for i in range(ROWS)])
    assert any("which nothing reads" in note for note in experiment.notes)


def test_copies_of_another_advantage_are_told(base: Path, tmp_path: Path) -> None:
    rows = [row(i, advantage=1.0) for i in range(ROWS)] + [row(0, advantage=2.0)]
    experiment = built(base, tmp_path, rows, **{"local.advantage_temperature": 1.0})
    assert any(
        note.startswith("1 of") and "copies of a row of another advantage" in note
        for note in experiment.notes
    )


def test_other_advantages_are_other_rows_of_a_run(base: Path, tmp_path: Path) -> None:
    hashes = set()
    for number, advantages in enumerate(((None, None), (1.0, None), (1.0, 2.0))):
        given = {i: {"advantage": a} for i, a in enumerate(advantages) if a is not None}
        folder = tmp_path / str(number)
        folder.mkdir()
        experiment = built(base, folder, [row(i, **given.get(i, {})) for i in range(ROWS)])
        hashes.add(experiment.data_sha256)
    assert len(hashes) == 3


def test_a_file_with_advantages_trains_as_one_without_until_a_temperature_is_set(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    from fedmira.experiment import run_experiment
    from small import adapter_bytes

    found = []
    for number, (key, temperature) in enumerate(((False, 0.0), (True, 0.0), (True, 0.5))):
        folder = tmp_path / f"rows-{number}"
        folder.mkdir()
        rows = [row(i, **({"advantage": float(i % 3)} if key else {})) for i in range(ROWS)]
        experiment = built(base, folder, rows, **{"local.advantage_temperature": temperature})
        output = tmp_path / f"run-{number}"
        run_experiment(experiment, output)
        found.append(adapter_bytes(output))
    assert found[0] == found[1]
    assert found[1] != found[2]
