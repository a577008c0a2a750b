"""Folders that verbs write from a run: all there or not at all, and every file in their record."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmira.config import ModelSettings
from fedmira.errors import RunFolderError
from fedmira.fleet import read_fleet
from fedmira.model import load_base
from fedmira.records import RECORD, check_files, new_folder
from fedmira.runs import accept_files, verify_folder
from small import CLIENTS

Call = Callable[..., Any]
CLIENT = sorted(CLIENTS)[0]
VERBS: dict[str, list[str]] = {
    "merge": ["merge", "RUN"],
    "compress": ["compress", "RUN", "--rank", "2"],
    "compress around": ["compress", "RUN", "--rank", "2", "--around", "uniform"],
    "align": ["align", "RUN"],
    "export": ["export", "RUN", "--client", CLIENT],
    "export merged": ["export", "RUN", "--client", CLIENT, "--merged"],
    "serve-config": ["serve-config", "RUN"],
}


@pytest.fixture(params=sorted(VERBS))
def written(
    request: pytest.FixtureRequest, fedmira: Call, command_run: Any, tmp_path: Path
) -> Path:
    words = [str(command_run.folder) if word == "RUN" else word for word in VERBS[request.param]]
    folder = tmp_path / "written"
    ended = fedmira(*words, "--output", folder)
    assert ended.code == 0, ended.err
    return folder


def files_of(folder: Path) -> list[str]:
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    return sorted(names)


def test_every_file_is_in_the_record_and_each_damage_is_named(written: Path) -> None:
    names = files_of(written)
    found = verify_folder(written)
    assert sorted(found.checked) == names and not found.damaged and not found.unchecked
    for name in names:
        content = (written / name).read_bytes()
        middle = len(content) // 2
        (written / name).write_bytes(
            content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        )
        damaged = verify_folder(written).damaged
        assert len(damaged) == 1 and str(written / name) in damaged[0], name
        (written / name).write_bytes(content)
    gone = next(name for name in names if name != RECORD)
    (written / gone).unlink()
    assert "is missing" in verify_folder(written).damaged[0]


def test_a_damaged_adapter_of_a_result_is_not_used(
    fedmira: Call, command_run: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    assert fedmira("compress", command_run.folder, "--rank", "2", "-o", folder).code == 0
    weights = folder / CLIENT / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 16
    weights.write_bytes(content)
    with pytest.raises(RunFolderError, match=f"{CLIENT}/adapter_model.safetensors.*verify"):
        read_fleet([folder])
    alone = shutil.copytree(folder / CLIENT, tmp_path / "alone")
    assert read_fleet([alone]).names == ("alone",), "taken away from its record it is anybody's"


def test_a_damaged_merged_model_is_no_base(fedmira: Call, command_run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    words = ["export", command_run.folder, "--client", CLIENT, "--merged", "-o", folder]
    assert fedmira(*words).code == 0
    load_base(ModelSettings(base=str(folder), device="cpu"))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 16
    weights.write_bytes(content)
    with pytest.raises(RunFolderError, match="whole/model.safetensors"):
        load_base(ModelSettings(base=str(folder), device="cpu"))


def test_a_card_may_be_changed_and_verify_says_so(
    fedmira: Call, command_run: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "one"
    assert fedmira("export", command_run.folder, "--client", CLIENT, "-o", folder).code == 0
    (folder / "README.md").write_text("mine\n", encoding="utf-8")
    check_files(folder)
    told = fedmira("verify", folder)
    assert told.code == 2 and "README.md" in told.err
    accept_files(folder, ["README.md"])
    assert fedmira("verify", folder).code == 0


def test_a_folder_that_could_not_be_finished_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "new") as aside:
        (aside / "half.txt").write_text("half", encoding="utf-8")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_what_lies_there_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RunFolderError, match="never overwritten"), new_folder(tmp_path / "there"):
        pass
    assert (tmp_path / "there" / "mine.txt").read_text(encoding="utf-8") == "mine"
