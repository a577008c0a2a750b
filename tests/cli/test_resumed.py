"""What --resume says of a run that has nothing left to do, or that shall become another one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmira.config import dump_config
from small import make_config

SMALL = {"rounds.count": 2, "graph.kind": "uniform"}


def finished(
    fedmira: Callable[..., Any], base_folder: Path, clients_folder: Path, folder: Path
) -> Any:
    """The document of a run of two rounds into `folder`/run."""
    config = folder / "config.toml"
    config.write_text(
        dump_config(make_config(base_folder, clients_folder, SMALL)), encoding="utf-8"
    )
    ended = fedmira("run", config, "--output", folder / "run", "--format", "json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def test_resuming_a_finished_run_says_so_and_repeats_nothing(
    fedmira: Callable[..., Any], base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    document, folder = finished(fedmira, base_folder, clients_folder, tmp_path), tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    as_text = fedmira("run", "--resume", "--output", folder)
    as_json = fedmira("run", "--resume", "--output", folder, "--format", "json")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert (as_text.code, as_json.code) == (0, 0)
    for ended in (as_text, as_json):
        assert (
            "already finished, 2 of 2 rounds; nothing to do" in " ".join(ended.err.split())
            and "round 1/2" not in ended.err
        )
    assert json.loads(as_json.out) == document
    assert "after_align_loss" in as_text.out and "report.html" in as_text.out


def test_results_that_were_removed_are_made_again(
    fedmira: Callable[..., Any], base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    document, page = (
        finished(fedmira, base_folder, clients_folder, tmp_path),
        tmp_path / "run" / "report.html",
    )
    page.unlink()
    ended = fedmira("run", "--resume", "--output", tmp_path / "run", "--format", "json")
    assert ended.code == 0 and page.is_file() and json.loads(ended.out) == document


def test_a_longer_run_is_a_new_run(
    fedmira: Callable[..., Any], base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    finished(fedmira, base_folder, clients_folder, tmp_path)
    folder = tmp_path / "run"
    refused = fedmira("run", "--resume", "--output", folder, "--set", "rounds.count=3")
    assert (refused.code, refused.out) == (2, "")
    text = " ".join(refused.err.split())
    assert "cannot make a run longer or shorter" in text
    way_out = re.search(r"fedmira run (\S+) --set rounds.count=N --output NEW", text)
    assert way_out is not None
    ended = fedmira("run", way_out[1], "--set", "rounds.count=3", "--output", tmp_path / "longer")
    assert ended.code == 0, ended.err

    def lines(run: Path) -> list[str]:
        events = [
            json.loads(line)
            for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        return [event["sent_hash"] for event in events if event["event"] == "train"]

    first, longer = lines(folder), lines(tmp_path / "longer")
    assert longer[: len(first)] == first and len(longer) == len(first) * 3 // 2, (
        "the longer run begins as the shorter one"
    )
