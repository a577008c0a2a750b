"""Runs and answers with reference decoding: of training rows alone, and never of an old adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedmira.adapters import Adapter
from fedmira.clients import LocalClients
from fedmira.errors import ConfigError, RunFolderError
from fedmira.experiment import build_experiment
from fedmira.model import LoraKind
from fedmira.studies.referring import answer
from fedmira.studies.saved import clients_of, reload_adapters
from small import adapter_bytes, call_main, make_config, make_run, table_of, write_clients

SHARE = {"evaluation.reference_share": 0.4}


@pytest.fixture(scope="module")
def plain(
    base_folder: Path, clients_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("plain") / "run"
    return make_run(base_folder, clients_folder, output, {"algorithm.name": "local"})


@pytest.fixture(scope="module")
def referred(
    base_folder: Path, clients_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("referred") / "run"
    return make_run(base_folder, clients_folder, output, {"algorithm.name": "local", **SHARE})


def losses(run: Path) -> list[float]:
    return [float(row["after_align_loss"]) for row in table_of(run, "clients")]


def test_training_is_the_same_and_losses_are_of_the_mixture(plain: Path, referred: Path) -> None:
    def weights(run: Path) -> dict[str, bytes]:
        return {k: v for k, v in adapter_bytes(run).items() if k.endswith(".safetensors")}

    assert weights(plain) == weights(referred)
    assert all(one != other for one, other in zip(losses(plain), losses(referred), strict=True))
    again = clients_of(reload_adapters(referred))
    found = again.losses(reload_adapters(referred).adapters)
    assert [loss.per_token for loss in found.values()] == pytest.approx(losses(referred), abs=1e-6)
    # Plain PEFT has nothing to refer to: what it proves is the loss of the adapter alone.
    proven = json.loads((referred / "run.json").read_text("utf-8"))["export"]["checked"]
    (client,) = proven
    names = [row["client"] for row in table_of(plain, "clients")]
    assert proven[client] == pytest.approx(losses(plain)[names.index(client)], abs=1e-3)


def test_nothing_of_a_store_is_written(plain: Path, referred: Path) -> None:
    files = [
        {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
        for run in (plain, referred)
    ]
    assert files[0] == files[1]


def test_a_store_is_of_training_rows_and_made_anew_for_another_adapter(
    base_folder: Path, clients_folder: Path
) -> None:
    config = make_config(base_folder, clients_folder, {"data.validation_fraction": 0.2, **SHARE})
    experiment = build_experiment(config)
    clients = experiment.clients
    assert isinstance(clients, LocalClients) and clients.references is not None
    name, data = next(iter(clients.data.items()))
    assert isinstance(experiment.kind, LoraKind)
    scale = clients.settings.scales[name]
    adapter: Adapter = dict(experiment.starts[name])
    store = clients.references.of(data, adapter, scale)
    assert store.targets.tolist() == [token for row in data.train for token in row.response]
    assert clients.references.of(data, dict(adapter), scale) is store
    moved = {key: tensor + 0.01 for key, tensor in adapter.items()}
    again = clients.references.of(data, moved, scale)
    assert again is not store and not torch.equal(again.keys, store.keys)


def test_a_share_of_0_asks_the_adapter_alone(base_folder: Path, clients_folder: Path) -> None:
    clients = build_experiment(make_config(base_folder, clients_folder)).clients
    assert isinstance(clients, LocalClients) and clients.references is None


def test_answers_lean_on_rows_only_where_a_share_is_asked_for(plain: Path, referred: Path) -> None:
    saved = reload_adapters(plain)
    name = next(iter(saved.adapters))
    row = json.loads(
        (Path(saved.config.data.path) / name / "train.jsonl").read_text().split("\n")[0]
    )
    alone = answer(saved, name, row["input"])
    assert answer(saved, name, row["input"], reference_share=0.0) == alone
    leaning = answer(saved, name, row["input"], reference_share=0.95)
    assert leaning != alone
    # The run's own setting is the default.
    own = reload_adapters(referred)
    asked = answer(own, name, row["input"], reference_share=0.4)
    assert answer(own, name, row["input"]) == asked


def test_the_verbs_take_a_share(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    name = next(iter(reload_adapters(plain).adapters))
    base = ["generate", str(plain), "w1 w2", "--client", name]
    alone, leaning = call_main(*base), call_main(*base, "--reference-share", "0.95")
    assert alone.code == leaning.code == 0
    assert call_main(*base, "--reference-share", "0").out == alone.out != leaning.out
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\n"))
    told = call_main(
        "chat", str(plain), "--client", name, "--reference-share", "0.95", "--format", "json"
    )
    assert told.code == 0
    answers = json.loads(told.out)[0]["answers"]
    assert answers["local"] == leaning.out.strip()
    wrong = call_main(*base, "--reference-share", "1")
    assert wrong.code == 2 and "must be 0 or more and below 1" in wrong.err


def test_rows_that_are_not_those_of_the_run_make_no_store(
    base_folder: Path, tmp_path: Path
) -> None:
    rows = write_clients(tmp_path / "rows", {"apple-1": 14, "birch-1": 12})
    run = make_run(base_folder, rows, tmp_path / "run", {"algorithm.name": "local"})
    file = rows / "apple-1" / "train.jsonl"
    file.write_text("".join(file.read_text("utf-8").splitlines(keepends=True)[1:]), "utf-8")
    with pytest.raises(RunFolderError, match="the rows here are not those of the run"):
        answer(reload_adapters(run), "apple-1", "w1", reference_share=0.5)


def test_a_share_goes_with_lora_alone(base_folder: Path, clients_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"goes with adapter.kind = 'lora' only"):
        make_config(base_folder, clients_folder, {"adapter.kind": "prompt", **SHARE})


def test_a_share_outside_of_its_limits_is_named(plain: Path) -> None:
    with pytest.raises(ConfigError, match="must be 0 or more and below 1"):
        answer(reload_adapters(plain), "apple-1", "w1", reference_share=-0.1)
