"""Runs whose disk is full, whose folder is closed or that are interrupted, and their resume."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedmira.records.folder
from fedmira.cli import main
from fedmira.config import dump_config
from fedmira.errors import RunError
from fedmira.experiment import Experiment, build_experiment, resume_experiment, run_experiment
from fedmira.model import BaseModel
from fedmira.runs import CheckpointFolder, RunFolder
from small import adapter_bytes, events_of, make_config, table_of

SETTINGS: dict[str, Any] = {
    "graph.kind": "category",
    "rounds.count": 3,
    "evaluation.every": 2,
    "evaluation.rouge": True,
}


@pytest.fixture(scope="module")
def experiment(base: BaseModel, base_folder: Path, clients_folder: Path) -> Experiment:
    return build_experiment(make_config(base_folder, clients_folder, SETTINGS), base)


@pytest.fixture(scope="module")
def straight(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(experiment, tmp_path_factory.mktemp("straight") / "run").folder


def assert_same(folder: Path, straight: Path) -> None:
    assert adapter_bytes(folder) == adapter_bytes(straight)
    assert events_of(folder, timing=False) == events_of(straight, timing=False)
    assert table_of(folder, "clients") == table_of(straight, "clients")


def failing_from(call: int, whole: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """The function until its `call`-th call, which raises, as all later ones do."""
    calls = 0

    def failing(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise error
        return whole(*arguments, **named)

    return failing


def full(path: str) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


WRITERS: tuple[tuple[Any, str, int], ...] = (
    (RunFolder, "append_events", 1),
    (RunFolder, "append_events", 3),
    (RunFolder, "append_round", 2),
    (CheckpointFolder, "save", 1),
    (CheckpointFolder, "save", 3),
    (RunFolder, "write_table", 1),
    (fedmira.records.folder, "replace_file", 8),
)


@pytest.mark.parametrize(("owner", "writer", "call"), WRITERS)
def test_a_full_disk_is_one_line_and_the_run_continues_to_the_same_bytes(
    experiment: Experiment, straight: Path, tmp_path: Path, owner: Any, writer: str, call: int
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, writer, failing_from(call, getattr(owner, writer), full("a-file")))
        told = r"^a-file: No space left .*; make room, and continue with --resume; .* is kept"
        with pytest.raises(RunError, match=told):
            run_experiment(experiment, folder)
    provenance = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    written = writer != "replace_file"  # run.json itself goes through it
    assert provenance["status"] == ("failed" if written else "running")
    assert_same(resume_experiment(experiment, folder).folder, straight)


def test_half_a_line_on_a_full_disk_is_cut_off_by_resume(
    experiment: Experiment, straight: Path, tmp_path: Path
) -> None:
    whole, calls = RunFolder.append_events, 0

    def half(self: RunFolder, events: Any) -> None:
        nonlocal calls
        calls += 1
        if calls < 3:
            return whole(self, events)
        with self.events.open("a", encoding="utf-8") as file:
            file.write('{"event": "ro')
        raise full(str(self.events))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "append_events", half)
        with pytest.raises(RunError, match=r"events\.jsonl: No space left"):
            run_experiment(experiment, tmp_path / "run")
    assert_same(resume_experiment(experiment, tmp_path / "run").folder, straight)


def test_the_command_line_tells_a_closed_folder_in_one_line_with_exit_code_3(
    experiment: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(dump_config(experiment.config), encoding="utf-8")
    closed = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a-file")
    monkeypatch.setattr(RunFolder, "append_round", failing_from(2, RunFolder.append_round, closed))
    monkeypatch.setattr(
        "sys.argv", ["fedmira", "run", str(config), "--output", str(tmp_path / "run")]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 3
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "allow this user to read and write there" in errors[0]


@pytest.mark.parametrize(
    ("work", "call"),
    [("train", 1), ("train", 3), ("row_losses", 3), ("row_losses", 5), ("score", 1)],
)
def test_an_interrupt_saves_without_measuring_and_continues_to_the_same_bytes(
    experiment: Experiment, straight: Path, tmp_path: Path, work: str, call: int
) -> None:
    of, folder = type(experiment.clients), tmp_path / "run"
    after: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        interrupted = False
        for name in ("train", "row_losses", "score", "choose"):
            whole = getattr(of, name)

            def noted(*given: Any, _whole: Any = whole, _name: str = name, **named: Any) -> Any:
                if interrupted:
                    after.append(_name)
                return _whole(*given, **named)

            patch.setattr(of, name, noted)
        calls, working = 0, getattr(of, work)

        def pressed(*given: Any, **named: Any) -> Any:
            nonlocal calls, interrupted
            calls += 1
            if calls == call:
                interrupted = True
                raise KeyboardInterrupt
            return working(*given, **named)

        patch.setattr(of, work, pressed)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(experiment, folder)
    assert after == []
    provenance = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert provenance["status"] == "interrupted"
    rows = table_of(folder, "clients")
    known = events_of(folder, "evaluate")
    measured = {event["client"] for event in known if event["round"] == provenance["rounds_done"]}
    assert {row["client"] for row in rows if row["after_align_loss"]} == measured
    assert all(row["before_align_loss"] == "" for row in rows)
    assert_same(resume_experiment(experiment, folder).folder, straight)
