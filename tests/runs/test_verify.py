"""fedmira verify names every damaged file of a run, and the verbs refuse what they read of it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from fedmira.errors import FedmiraError, RunFolderError
from fedmira.runs import RunFolder, accept_files, verify_folder, write_page
from fedmira.studies.saved import reload_adapters
from small import call_main, make_run


@pytest.fixture(scope="module")
def run(base_folder: Path, clients_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"algorithm.name": "mira", "graph.kind": "uniform", "local.optimizer_state": "kept"}
    settings |= {"algorithm.space": "factor"}
    return make_run(base_folder, clients_folder, tmp_path_factory.mktemp("runs") / "run", settings)


def files_of(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    )


def flipped(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_a_whole_run_has_nothing_damaged_and_nothing_unchecked(run: Path) -> None:
    found = verify_folder(run)
    assert (found.damaged, found.unchecked) == ([], {})
    assert sorted(set(found.checked)) == files_of(run) == sorted(found.checked)


def test_every_file_with_a_flipped_bit_is_named(run: Path, tmp_path: Path) -> None:
    """One place of each file, drawn at random; the long form of this is `make torture`."""
    draw, folder = random.Random(3), tmp_path / "run"
    shutil.copytree(run, folder)
    for name in files_of(run):
        path = folder / name
        flipped(path, draw.randrange(path.stat().st_size), draw.randrange(8))
        damaged = verify_folder(folder).damaged
        assert damaged and path.name in " ".join(damaged), name
        shutil.copyfile(run / name, path)
    assert not verify_folder(folder).damaged, "and nothing stays of it"


def test_every_file_that_is_cut_or_gone_is_named(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for name in files_of(run):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-1])
        assert path.name in " ".join(verify_folder(folder).damaged), f"{name} cut"
        path.unlink()
        if name == "config.toml":
            with pytest.raises(RunFolderError, match=r"no run folder"):
                RunFolder.reopen(folder)
        elif name == "checkpoint/run.json":
            assert path.name in " ".join(verify_folder(folder).damaged)
        elif name.endswith("/hashes.sha256"):
            assert any(each.startswith(name[:-14]) for each in verify_folder(folder).unchecked)
        else:
            assert path.name in " ".join(verify_folder(folder).damaged), f"{name} gone"
        shutil.copyfile(run / name, path)


@pytest.mark.parametrize(
    "name",
    [
        "config.toml",
        "run.json",
        "adapters/index.json",
        "adapters/apple-1/adapter_model.safetensors",
    ],
)
def test_what_reads_a_damaged_file_refuses_it_by_name(run: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / name
    flipped(path, path.stat().st_size - 3, 0)
    with pytest.raises(FedmiraError, match=path.name):
        dict(reload_adapters(folder).adapters)
    assert call_main("evaluate", folder).code == 2
    assert call_main("verify", folder).code == 2
    if not name.endswith("safetensors"):
        with pytest.raises(RunFolderError, match=path.name):
            write_page(folder)


def test_an_adapter_of_a_run_without_a_record_is_still_held_against_its_index(
    run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for path in (folder / "hashes.sha256", folder / "checkpoint" / "run.json"):
        path.unlink()  # as older versions left it
    path = folder / "adapters" / "birch-1" / "adapter_model.safetensors"
    flipped(path, path.stat().st_size - 3, 5)
    with pytest.raises(RunFolderError, match=r"birch-1: .*index\.json.*--resume"):
        dict(reload_adapters(folder).adapters)
    found = verify_folder(folder)
    assert ["birch-1" in problem for problem in found.damaged] == [True]
    assert "its hash was not recorded" in found.unchecked["config.toml"]


def test_a_lost_record_is_no_way_around_the_hashes(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "hashes.sha256").unlink()
    with pytest.raises(RunFolderError, match=r"hashes\.sha256: .* is missing.*--accept all"):
        reload_adapters(folder)
    assert "hashes.sha256" in " ".join(verify_folder(folder).damaged)
    accept_files(folder, ["all"])
    assert not verify_folder(folder).damaged


def test_a_file_that_its_user_changed_can_be_accepted(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    card = folder / "adapters" / "apple-2" / "README.md"
    card.write_text("# My words\n", encoding="utf-8")
    refused = call_main("verify", folder)
    assert refused.code == 2 and "README.md" in refused.err
    ended = call_main(
        "verify", folder, "--accept", "adapters/apple-2/README.md", "--format", "json"
    )
    assert (ended.code, json.loads(ended.out)["damaged"]) == (0, [])
    with pytest.raises(RunFolderError, match="cannot be"):
        accept_files(folder, ["checkpoint/round-000002/values.json"])


def test_damaged_results_are_written_again_by_a_resume(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "adapters" / "apple-1" / "adapter_model.safetensors"
    whole = path.read_bytes()
    flipped(path, 200, 1)
    ended = call_main("run", "--resume", "--output", folder)
    assert ended.code == 0 and "adapter_model.safetensors" in ended.err, ended.err
    assert path.read_bytes() == whole
    assert not verify_folder(folder).damaged


def test_a_folder_of_runs_is_verified_with_all_of_them(run: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(run, tmp_path / "all" / name)
    flipped(tmp_path / "all" / "two" / "graph.json", 10, 2)
    found = verify_folder(tmp_path / "all")
    assert len(found.damaged) == 1 and "two/graph.json" in found.damaged[0]
    with pytest.raises(RunFolderError, match="no folder that a verb wrote"):
        verify_folder(tmp_path / "all" / "one" / "metrics")
