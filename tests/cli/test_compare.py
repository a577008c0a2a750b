"""fedmira compare on the command line.

Variants, a reference, and tables that say what was equal.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmira.config import dump_config
from fedmira.runs import accept_files
from small import make_config, write_clients

SMALL = (
    "--set",
    "graph.kind=category",
    "--set",
    "rounds.count=1",
    "--set",
    "evaluation.rouge=false",
    "--set",
    "local.steps=1",
)


def test_variants_a_reference_and_budgets_are_printed(
    config_file: Path, tmp_path: Path, fedmira: Callable[..., Any]
) -> None:
    arguments = (
        "compare",
        config_file,
        "--algorithms",
        "local,mira",
        "--seeds",
        "0,1",
        *SMALL,
        "--output",
        tmp_path / "all",
    )
    more = (
        "--variant",
        "loose=algorithm.coupling=0.1;algorithm.size_scale=0",
        "--reference",
        "mira",
    )
    ended = fedmira(*arguments, *more)
    assert ended.code == 0, ended.err
    for word in (
        "loose",
        "against local: paired difference",
        "against mira: paired difference",
        "local steps",
        "MiB up",
        "A client is better",
        "comparison.html",
    ):
        assert word in ended.out
    assert "UNEQUAL" not in ended.out
    document = json.loads(fedmira(*arguments, *more, "--format", "json").out)
    assert document["equal"] is True and document["baselines"] == ["local", "mira"]
    assert [row["method"] for row in document["algorithms"]] == ["local", "mira", "loose"] and len(
        document["runs"]
    ) == 6
    assert len(document["clients"]) == 5 and "loose_against_mira" in document["clients"][0]


def test_unequal_runs_are_said_loudly(
    config_file: Path, tmp_path: Path, fedmira: Callable[..., Any]
) -> None:
    arguments = (
        "compare",
        config_file,
        "--algorithms",
        "local,mira",
        *SMALL,
        "--output",
        tmp_path / "all",
    )
    assert fedmira(*arguments).code == 0
    events = tmp_path / "all" / "mira-seed0" / "events.jsonl"
    events.write_text(
        events.read_text(encoding="utf-8").replace('"steps": 1,', '"steps": 2,'), encoding="utf-8"
    )
    refused = fedmira(*arguments)
    assert refused.code == 2 and f"--accept {events.name}" in refused.err
    accept_files(events.parent, [events.name])
    ended = fedmira(*arguments)
    assert ended.code == 0 and "UNEQUAL: these methods were not run on equal terms" in ended.out
    assert "mira, seed 0: other local steps: 6, and 3 under local" in ended.out


@pytest.mark.parametrize("text", ["loose", "loose=", "=graph.nearest=3", "loose=;"])
def test_a_variant_without_name_or_settings_is_refused(
    text: str, config_file: Path, tmp_path: Path, fedmira: Callable[..., Any]
) -> None:
    ended = fedmira(
        "compare",
        config_file,
        "--algorithms",
        "local",
        "--variant",
        text,
        "--output",
        tmp_path / "all",
    )
    assert (
        ended.code == 2
        and "must be a name of its own" in ended.err
        and not (tmp_path / "all").exists()
    )


def test_rounds_and_seconds_to_a_target_are_printed(
    config_file: Path, tmp_path: Path, fedmira: Callable[..., Any]
) -> None:
    arguments = (
        "compare",
        config_file,
        "--algorithms",
        "local,fedavg",
        *SMALL,
        "--set",
        "evaluation.every=1",
        "--output",
        tmp_path / "all",
    )
    ended = fedmira(*arguments, "--target-loss", "1000")
    assert ended.code == 0, ended.err
    assert (
        "to a mean test loss of 1000" in ended.out
        and "number type" in ended.out
        and "float32" in ended.out
    )
    document = json.loads(
        fedmira(*arguments, "--target-loss", "0.0001", "--format", "json").out
    )  # the runs are there already
    assert [
        (row["rounds_to_target"], row["seeds_to_target"]) for row in document["algorithms"]
    ] == [(None, 0), (None, 0)]
    refused = fedmira(*arguments[:-1], tmp_path / "other", "--target-loss", "-1")
    assert (
        refused.code == 2
        and "must be a finite number above 0" in refused.err
        and not (tmp_path / "other").exists()
    )


def test_a_finished_comparison_is_read_again_without_its_rows(
    config_file: Path, clients_folder: Path, tmp_path: Path, fedmira: Callable[..., Any]
) -> None:
    rows = shutil.copytree(clients_folder, tmp_path / "rows")
    arguments = (
        *("compare", config_file, "--algorithms", "local,fedavg"),
        *("--set", f"data.path={rows}", "--set", "rounds.count=1"),
        *("--set", "evaluation.rouge=false", "--output", tmp_path / "all"),
    )
    first = fedmira(*arguments)
    assert first.code == 0, first.err
    shutil.rmtree(rows)
    again = fedmira(*arguments)
    assert (again.code, again.out) == (0, first.out), again.err


def test_who_is_left_out_is_told_once_and_kept(
    base_folder: Path, tmp_path: Path, fedmira: Callable[..., Any]
) -> None:
    """Rows are read for each seed; the same line is no news the second time."""
    rows = write_clients(tmp_path / "rows", {"apple-1": 20, "apple-2": 20, "few": 3})
    config = make_config(base_folder, rows, {"rounds.count": 1, "local.steps": 1})
    (tmp_path / "my.toml").write_text(dump_config(config), encoding="utf-8")
    arguments = ("--algorithms", "local", "--seeds", "0,1", "--set", "evaluation.rouge=true")
    ended = fedmira("compare", tmp_path / "my.toml", *arguments, "--output", tmp_path / "out")
    assert ended.code == 0, ended.err
    told = "left out: few: 3 rows; data.min_rows is 4"
    assert ended.err.count(told) == 1 and "WARNING" not in ended.err
    for seed in (0, 1):
        run = json.loads((tmp_path / "out" / f"local-seed{seed}" / "run.json").read_text())
        assert told in run["notes"]
