"""A run folder on a machine that does not have the rows, as the server of a federation has it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmira.config import dump_config, load_config
from fedmira.runs import accept_files
from small import command


@pytest.fixture
def moved_rows(command_run: Any, tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of the run whose config reads its rows somewhere else."""

    def copied(rows: Path) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(command_run.folder, folder)
        config = load_config(folder / "config.toml")
        (folder / "config.toml").write_text(
            dump_config(
                config.model_copy(
                    update={"data": config.data.model_copy(update={"path": str(rows)})}
                )
            ),
            encoding="utf-8",
        )
        accept_files(folder, ["config.toml"])
        return folder

    return copied


def instruction_of(clients_folder: Path, client: str) -> str:
    line = (clients_folder / client / "train.jsonl").read_text(encoding="utf-8").splitlines()[0]
    return str(json.loads(line).get("instruction", ""))


def forget_prompts(folder: Path) -> None:
    """Takes what prompts share out of index.json, which runs did not save before."""
    index = folder / "adapters" / "index.json"
    entries = json.loads(index.read_text(encoding="utf-8"))
    for entry in entries.values():
        del entry["prompt"]
    index.write_text(json.dumps(entries), encoding="utf-8")
    accept_files(folder, ["adapters/index.json"])


def test_generate_needs_no_rows_where_the_instruction_is_given(
    command_run: Any,
    clients_folder: Path,
    moved_rows: Callable[[Path], Path],
    fedmira: Callable[..., Any],
    tmp_path: Path,
) -> None:
    folder, said = moved_rows(tmp_path / "nowhere"), instruction_of(clients_folder, "apple-1")
    with_rows = fedmira("generate", command_run.folder, "--client", "apple-1", "w4 w8")
    without = fedmira("generate", folder, "--client", "apple-1", "w4 w8", "--instruction", said)
    assert without.code == 0, without.err
    assert without.out == with_rows.out


def test_generate_says_what_is_missing_without_rows_and_instruction(
    clients_folder: Path,
    moved_rows: Callable[[Path], Path],
    fedmira: Callable[..., Any],
    tmp_path: Path,
) -> None:
    folder = moved_rows(tmp_path / "nowhere")
    said = instruction_of(clients_folder, "apple-1")
    shared = fedmira("generate", folder, "--client", "apple-1", "w4 w8")
    given = fedmira("generate", folder, "--client", "apple-1", "w4 w8", "--instruction", said)
    assert shared.code == 0 and shared.out == given.out, "the instruction is saved in index.json"
    forget_prompts(folder)
    ended = fedmira("generate", folder, "--client", "apple-1", "w4 w8")
    assert ended.code == 2 and "give --instruction" in " ".join(ended.err.split())


def test_rows_of_other_clients_are_not_taken_for_those_of_the_run(
    clients_folder: Path,
    moved_rows: Callable[[Path], Path],
    fedmira: Callable[..., Any],
    tmp_path: Path,
) -> None:
    others = tmp_path / "others"
    shutil.copytree(clients_folder, others)
    (others / "apple-1").rename(others / "apple-9")
    folder = moved_rows(others)
    ended = fedmira("evaluate", folder)
    assert ended.code == 2 and "the rows of apple-1 are not on this machine" in " ".join(
        ended.err.split()
    )
    forget_prompts(folder)
    ended = fedmira("generate", folder, "--client", "apple-1", "w4 w8")
    assert ended.code == 2 and "on another machine" in " ".join(ended.err.split())


def test_evaluate_warns_of_rows_that_have_changed(
    clients_folder: Path, moved_rows: Callable[[Path], Path], tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(clients_folder, changed)
    rows = changed / "apple-1" / "train.jsonl"
    rows.write_text(
        "".join(rows.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8"
    )
    ended = command("evaluate", moved_rows(changed))
    assert (
        ended.returncode == 0
        and "these are not known to be the rows of the run: they have changed"
        in " ".join(ended.stderr.split())
    )
