"""Leaving: the certificate's hashes are those of a run that never had the client, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedmira.errors import RunFolderError
from fedmira.experiment import build_experiment, run_experiment
from fedmira.model import BaseModel
from fedmira.runs import RunFolder
from fedmira.studies.forgetting import check_certificate, forget_client
from small import CLIENTS, adapter_bytes, call_main, make_config, write_clients

APART = {"engine.apart": True, "rounds.count": 2}
GRAPH = {**APART, "algorithm.name": "mira", "graph.kind": "category", "graph.warmup_rounds": 0}


def made(
    base: BaseModel, base_folder: Path, data: Path, output: Path, settings: dict[str, Any]
) -> Path:
    config = make_config(base_folder, data, settings)
    run_experiment(build_experiment(config, base), output)
    return output


@pytest.mark.parametrize(
    ("settings", "leaver", "replayed"),
    [
        (GRAPH, "birch-2", {"birch-1"}),
        ({**GRAPH, "algorithm.server_step": 0.2}, "apple-1", {"apple-2", "apple-3"}),
        # Without apple-1 the largest degree is another one, and with it everybody's step.
        (GRAPH, "apple-1", {"apple-2", "apple-3", "birch-1", "birch-2"}),
        ({**APART, "algorithm.name": "local"}, "apple-1", {"apple-3"}),  # of the fewest rows
        ({**APART, "algorithm.name": "fedavg"}, "apple-1", set(CLIENTS) - {"apple-1"}),
        ({**GRAPH, "engine.apart": False}, "birch-2", set(CLIENTS) - {"birch-2"}),
    ],
    ids=["joined", "own step", "largest degree", "alone", "shared", "common passes"],
)
def test_adapters_are_those_of_a_run_on_data_that_never_had_the_client(
    settings: dict[str, Any],
    leaver: str,
    replayed: set[str],
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
) -> None:
    run = made(base, base_folder, clients_folder, tmp_path / "run", settings)
    before = adapter_bytes(run)
    forgotten = forget_client(run, leaver, tmp_path / "new")
    assert adapter_bytes(run) == before
    told = forgotten.certificate
    assert set(told["replayed"]) == replayed
    assert set(told["kept"]) == set(CLIENTS) - replayed - {leaver}
    assert told["cost"] == {
        "client_rounds_replayed": 2 * len(replayed),
        "client_rounds_of_retraining": 2 * (len(CLIENTS) - 1),
    }
    # Rows on the disk that never had the client, and not a filter within the same program.
    others = write_clients(
        tmp_path / "others", {name: count for name, count in CLIENTS.items() if name != leaver}
    )
    never = made(base, base_folder, others, tmp_path / "never", settings)
    expected, found = adapter_bytes(never, cards=False), adapter_bytes(forgotten.folder, False)
    weights = {name for name in expected if name.endswith(".safetensors")}
    assert len(weights) == len(CLIENTS) - 1
    assert {name for name in found if name.endswith(".safetensors")} == weights
    assert [name for name in sorted(weights) if found[name] != expected[name]] == []
    index = json.loads((never / "adapters" / "index.json").read_text(encoding="utf-8"))
    assert told["adapters"] == {name: entry["sha256"] for name, entry in index.items()}
    assert (
        leaver not in (forgotten.folder / "graph.json").read_text(encoding="utf-8")
        if (forgotten.folder / "graph.json").exists()
        else True
    )
    assert check_certificate(forgotten.folder) == []


def test_a_certificate_is_held_against_retraining_and_against_its_files(
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
) -> None:
    run, new = made(base, base_folder, clients_folder, tmp_path / "run", GRAPH), tmp_path / "new"
    ended = call_main("forget", run, "--client", "birch-2", "--output", new)
    assert ended.code == 0, ended.err
    said = ended.out
    assert "trained again: birch-1\n" in said
    assert "cost: 2 rounds of single clients, of 8 that retraining takes" in said
    assert "the certificate holds" in call_main("forget", new, "--check", "--retrain-from", run).out
    assert call_main("verify", new).code == 0
    weights = new / "adapters" / "birch-1" / "adapter_model.safetensors"
    shutil.copy(run / "adapters" / "birch-1" / "adapter_model.safetensors", weights)
    assert check_certificate(new) == ["the adapter of birch-1 is not the one that was certified"]
    written = json.loads((new / "forgotten.json").read_text(encoding="utf-8"))
    written["kept"] = []
    (new / "forgotten.json").write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"forgotten\.json: the file is damaged"):
        check_certificate(new)
    call_main("verify", new, "--accept", "forgotten.json")  # who can change one can change both
    assert "forgotten.json was changed: its own hash is another one" in check_certificate(new)


def test_what_cannot_be_forgotten_is_refused_before_anything_is_trained(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    run = made(base, base_folder, clients_folder, tmp_path / "run", GRAPH)
    with pytest.raises(RunFolderError, match="no client 'nobody'"):
        forget_client(run, "nobody", tmp_path / "new")
    told = json.loads((run / "run.json").read_text(encoding="utf-8"))
    RunFolder(run).write_json("run.json", {**told, "status": "failed"})
    with pytest.raises(RunFolderError, match="this run is failed"):
        forget_client(run, "birch-2", tmp_path / "new")
    told["data"]["sha256"] = "0"
    RunFolder(run).write_json("run.json", told)
    with pytest.raises(RunFolderError, match="the rows are not those"):
        forget_client(run, "birch-2", tmp_path / "new")
    assert not (tmp_path / "new").exists()
