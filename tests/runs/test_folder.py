"""The run folder is made once and never overwritten.

Its growing files can be cut back to a checkpoint.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedmira.errors import RunFolderError
from fedmira.runs import RunFolder


def test_a_new_folder_has_its_parts_and_the_config(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "deep" / "run", "seed = 3\n")
    assert {path.name for path in folder.path.iterdir()} == {
        "config.toml",
        "metrics",
        "adapters",
        "checkpoint",
    }
    assert (folder.path / "config.toml").read_text(encoding="utf-8") == "seed = 3\n"


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert RunFolder.create(tmp_path / "run", "").path.is_dir()


def test_a_taken_path_is_never_overwritten(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", "seed = 3\n")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for path in (tmp_path / "run", tmp_path / "file"):
        with pytest.raises(
            RunFolderError,
            match="never overwritten; choose another --output, or continue it with --resume",
        ):
            RunFolder.create(path, "seed = 4\n")
    assert (tmp_path / "run" / "config.toml").read_text(encoding="utf-8") == "seed = 3\n"
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_folder_whose_maker_was_killed_at_once_can_be_used(tmp_path: Path) -> None:
    """Killed while it wrote config.toml: nothing is lost, start again. Killed right after.

    Resume finds what it needs.
    """
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "config.toml.partial").write_text("seed", encoding="utf-8")
    RunFolder.create(tmp_path / "early", "seed = 3\n")
    assert not list((tmp_path / "early").glob("*.partial"))
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "config.toml").write_text("seed = 3\n", encoding="utf-8")
    folder = RunFolder.reopen(tmp_path / "late")
    folder.append_events([{"event": "round", "round": 1}])
    folder.append_round({"round": 1, "test_loss": 2.5})
    folder.write_json("adapters/index.json", {})
    assert folder.sizes() == {
        "events.jsonl": len(folder.events.read_bytes()),
        "rounds.csv": len("round,test_loss\n1,2.5\n"),
    }


def test_only_a_run_folder_can_be_reopened(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no run folder \(config.toml is missing\)"):
        RunFolder.reopen(tmp_path)
    with pytest.raises(RunFolderError, match="nowhere: there is no such folder"):
        RunFolder.reopen(tmp_path / "nowhere")


def test_growing_files_are_cut_back_to_the_bytes_of_a_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "")
    folder.append_events([{"event": "round", "round": 1}])
    folder.append_round({"round": 1, "test_loss": 2.5})
    sizes = folder.sizes()
    before = folder.events.read_bytes(), folder.rounds_csv.read_bytes()
    folder.append_events([{"event": "round", "round": 2}] * 3)
    folder.append_round({"round": 2, "test_loss": 2.25})
    with folder.events.open("a", encoding="utf-8") as file:
        file.write('{"event": "rou')  # a crash in the middle of a line
    folder.cut_back(sizes)
    assert (
        (folder.events.read_bytes(), folder.rounds_csv.read_bytes())
        == before
        == (b'{"event": "round", "round": 1}\n', b"round,test_loss\n1,2.5\n")
    )


def test_cutting_back_to_nothing_brings_the_header_back(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "")
    folder.append_round({"round": 1, "test_loss": 2.5})
    folder.cut_back({})
    folder.append_round({"round": 1, "test_loss": 3.5})
    assert folder.rounds_csv.read_text(encoding="utf-8") == "round,test_loss\n1,3.5\n"


def test_replaced_files_leave_nothing_half_written(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "")
    folder.write_table("clients.csv", [{"client": "a", "loss": 1.5}, {"client": "b", "loss": ""}])
    folder.write_json("run.json", {"status": "running"})
    folder.write_json("run.json", {"status": "finished"})
    assert (folder.metrics / "clients.csv").read_text(
        encoding="utf-8"
    ) == "client,loss\na,1.5\nb,\n"
    assert folder.read_json("run.json") == {"status": "finished"}
    assert [path.name for path in folder.path.rglob("*.partial")] == []


def test_numbers_that_json_does_not_know_never_reach_a_file(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "")
    with pytest.raises(ValueError, match="JSON compliant"):
        folder.append_events([{"loss": float("nan")}])
    with pytest.raises(ValueError, match="JSON compliant"):
        folder.write_json("run.json", {"loss": float("inf")})


def test_a_damaged_document_is_named(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "")
    assert folder.read_json("run.json") == {}
    (folder.path / "run.json").write_text(json.dumps({"status": "finished"})[:-4], encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"run\.json: not valid JSON"):
        folder.read_json("run.json")


def test_two_processes_do_not_run_in_one_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "")
    with folder.locked():
        script = "from pathlib import Path; from fedmira.runs import RunFolder\n"
        script += f"with RunFolder(Path({str(folder.path)!r})).locked(): pass"
        other = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert "another process runs in this folder" in other.stderr
    with RunFolder(folder.path).locked():
        pass


def test_the_lock_goes_with_a_killed_process(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "")
    script = (
        "import sys, time; from pathlib import Path; from fedmira.runs import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked():\n"
        "    print('locked', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder.path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(RunFolderError, match="another process"), folder.locked():
            pass
        other.kill()
    with folder.locked():
        pass
