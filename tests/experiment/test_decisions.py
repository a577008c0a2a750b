"""For each client the adapter that its validation rows can show to be best, on real runs."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedmira
from fedmira.adapters import Adapter, modules
from fedmira.config import load_config
from fedmira.errors import ConfigError, DataError, RunFolderError
from fedmira.metrics import Standing, judge
from fedmira.model import BaseModel
from fedmira.runs import accept_files, verify_folder
from fedmira.studies import Decision, compare_algorithms, decide
from fedmira.studies.saved import clients_of, reload_adapters
from small import adapter_bytes, call_main, make_config, write_clients

SLOW: Mapping[str, Any] = {"local.learning_rate": 1e-6, "rounds.count": 2, "local.steps": 4}
FAST = ("algorithm.name=fedavg", "local.learning_rate=0.03")
ROWS = {"apple-1": 60, "apple-2": 60, "birch-1": 12}


@pytest.fixture(scope="module")
def compared(base: BaseModel, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds; under `local` hardly anything is learned, so that the others are surely better."""
    folder = tmp_path_factory.mktemp("decisions")
    config = make_config(base_folder, write_clients(folder / "rows", ROWS), SLOW)
    compare_algorithms(
        config, ["local"], [3, 4], folder / "runs", variants={"shared": FAST}, base=base
    )
    return folder / "runs"


@pytest.fixture(scope="module")
def decision(compared: Path, base: BaseModel) -> Decision:
    return decide(compared, base=base)


def product(adapter: Adapter, scale: float) -> dict[str, Any]:
    return {name: scale * up @ down for name, (down, up) in modules(adapter).items()}


def test_who_gains_beyond_its_margin_takes_the_others_adapter(
    decision: Decision, compared: Path
) -> None:
    assert decision.folder == compared / "decision" and decision.page.is_file()
    found = {one.client: one.judgement for one in decision.decisions.clients}
    assert {found[client].standing for client in ("apple-1", "apple-2")} == {Standing.better}
    assert found["birch-1"].rows < 4 and found["birch-1"].standing is Standing.unclear
    assert found["birch-1"].choice == "local"
    for one in decision.decisions.clients:
        source = one.judgement.choice
        assert one.keeps_own == (source == "local")
        if "+" not in source:
            made = adapter_bytes(compared / f"{source}-seed3")
            own = {k: v for k, v in made.items() if k.startswith(f"adapters/{one.client}/")}
            assert own and own.items() <= adapter_bytes(decision.folder).items()


def test_judgements_are_those_of_the_rule_on_losses_measured_again(
    decision: Decision, compared: Path, base: BaseModel
) -> None:
    """Each row as a client of its own, under each candidate."""
    saved = {
        name: reload_adapters(compared / f"{name}-seed3", base) for name in ("local", "shared")
    }
    clients = clients_of(saved["local"])
    client = "apple-2"
    rows = clients.data[client].validation
    losses: dict[str, list[float]] = {}
    for name, of in saved.items():
        losses[name] = [
            replace(clients, data={client: replace(clients.data[client], test=(row,))})
            .losses({client: of.adapters[client]})[client]
            .total
            for row in rows
        ]
    judged = next(one for one in decision.decisions.clients if one.client == client)
    tokens = [len(row.response) for row in rows]
    alone = judge(losses, tokens, "local")
    assert judged.judgement.own_loss == pytest.approx(alone.own_loss, rel=1e-5)
    without = decide(compared, compared.parent / "no-mixes", mixes=False, base=base)
    found = next(one for one in without.decisions.clients if one.client == client).judgement
    assert found.difference == pytest.approx(alone.difference, rel=1e-4)
    assert found.margin == pytest.approx(alone.margin, rel=1e-3)
    assert without.decisions.candidates == ("local", "shared")
    assert decision.decisions.candidates == ("local", "shared", "local + shared")
    tested = [len(row.response) for row in clients.data[client].test]
    own = clients.row_losses(saved["local"].adapters, "test")[client]
    assert judged.own_test == pytest.approx(math.fsum(own) / sum(tested))


def test_the_mix_is_half_of_each_as_a_product(compared: Path, base: BaseModel) -> None:
    from fedmira.studies import decision as module

    candidates = module._candidates(module._compared(compared, 3), base, None)
    half = module._halves(candidates)[0].adapters["apple-1"]
    scale = candidates[0].clients.settings.scales["apple-1"]
    own, other = (product(one.adapters["apple-1"], scale) for one in candidates)
    for name, found in product(half, scale).items():
        wanted = (own[name] + other[name]) / 2
        # one more direction than fits is cut: what is missing is the tail of the singular values
        tail = wanted.double().svd().S[4:].norm()
        assert (found - wanted).norm() == pytest.approx(float(tail), abs=1e-5)


def test_files_say_the_same_and_the_measured_gain_is_the_mean_over_clients(
    decision: Decision,
) -> None:
    document = json.loads((decision.folder / "decision.json").read_text(encoding="utf-8"))
    with (decision.folder / "decision.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["client"] for line in lines] == sorted(ROWS) == list(decision.table["client"])
    assert document["counts"] == {"better": 2, "cannot tell": 1, "no better": 0}
    gains = [one.test_gain or 0.0 for one in decision.decisions.clients]
    measured = document["measured"]
    assert measured["difference"] == pytest.approx(sum(gains) / 3) and measured["above"] == 0
    assert measured["low"] <= measured["difference"] <= measured["high"] <= 0
    page = decision.page.read_text(encoding="utf-8")
    for words in ("2 of 3 clients do better", "alone: the rows cannot tell", "The rule"):
        assert words in page


def test_a_run_is_held_against_its_clients_trained_alone(
    base: BaseModel, base_folder: Path, tmp_path: Path
) -> None:
    rows = write_clients(tmp_path / "rows", ROWS)
    settings = {"rounds.count": 2, "algorithm.name": "two-level"}
    fedmira.run(make_config(base_folder, rows, settings), base=base, output=tmp_path / "run")
    found = fedmira.decide(tmp_path / "run", base=base)
    alone = tmp_path / "run" / "decision" / "runs" / "local"
    fedmira.run(
        make_config(base_folder, rows, {"rounds.count": 2, "algorithm.name": "local"}),
        base=base,
        output=tmp_path / "local",
    )
    assert adapter_bytes(alone) == adapter_bytes(tmp_path / "local")
    assert found.decisions.candidates == ("local", "two-level", "local + two-level")
    again = fedmira.decide(tmp_path / "run", base=base)
    assert again.decisions.document() == found.decisions.document(), "the run is not made twice"


def test_settings_make_the_runs_first(base_folder: Path, tmp_path: Path) -> None:
    """Nobody learns enough to be told apart, and a party with too few rows is named."""
    rows = write_clients(tmp_path / "rows", {**ROWS, "few": 3})
    config = make_config(
        base_folder, rows, {"rounds.count": 2, "local.steps": 1, "algorithm.name": "mira"}
    )
    found = decide(config, tmp_path / "decided")
    told = "Left out: few: 3 rows; data.min_rows is 4"
    assert told in found.decisions.document()["notes"] and told in found.page.read_text()
    assert found.decisions.taken == sum(
        one.judgement.choice != "local" for one in found.decisions.clients
    )
    assert found.decisions.candidates[:3] == ("local", "flexlora", "mira")
    assert (tmp_path / "decided" / "runs" / "comparison.html").is_file()
    assert len(list((tmp_path / "decided" / "adapters").glob("*/adapter_config.json"))) == 3


def test_what_cannot_be_decided_is_told(compared: Path, base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run with seed 9; its seeds are 3, 4"):
        decide(compared, tmp_path / "a", seed=9, base=base)
    with pytest.raises(RunFolderError, match="its clients train alone"):
        decide(compared / "local-seed3", tmp_path / "b", base=base)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(RunFolderError, match="holds something else"):
        decide(compared, tmp_path / "c", base=base)
    with pytest.raises(ConfigError, match="give an output"):
        decide(make_config("bundled", tmp_path))
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_rows_that_changed_since_the_run_decide_nothing(
    compared: Path, base: BaseModel, tmp_path: Path
) -> None:
    """With a row more the split is another one: validation rows may have been trained on."""
    path = compared.parent / "rows" / "apple-1" / "train.jsonl"
    before = path.read_text(encoding="utf-8")
    row = {**json.loads(before.splitlines()[0]), "input": "w77 w78"}
    path.write_text(before + json.dumps(row) + "\n", encoding="utf-8")
    try:
        with pytest.raises(RunFolderError, match="may have been trained on; restore the rows"):
            decide(compared, tmp_path / "x", base=base)
        with pytest.raises(RunFolderError, match="are not those of the run"):
            fedmira.merge(compared / "local-seed3", strength="auto", output=tmp_path / "x")
    finally:
        path.write_text(before, encoding="utf-8")
    assert not (tmp_path / "x").exists()


def test_a_run_that_has_not_ended_is_not_held_against_one_that_has(
    compared: Path, base: BaseModel, tmp_path: Path
) -> None:
    begun = shutil.copytree(compared / "shared-seed3", tmp_path / "begun")
    run = json.loads((begun / "run.json").read_text(encoding="utf-8"))
    (begun / "run.json").write_text(json.dumps(run | {"status": "interrupted"}), encoding="utf-8")
    accept_files(begun, ["run.json"])
    with pytest.raises(RunFolderError, match=f"not finished.*--resume --output {begun}"):
        decide(begun, base=base)
    half = tmp_path / "half"
    shutil.copytree(compared / "local-seed3", half / "local-seed3")
    with pytest.raises(RunFolderError, match="this comparison is not finished"):
        decide(half, base=base)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "comparison.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RunFolderError, match=f"come from is {tmp_path / 'runs'}"):
        decide(tmp_path, tmp_path / "x", base=base)


def test_one_client_has_nobody_to_train_with(base_folder: Path, tmp_path: Path) -> None:
    config = make_config(base_folder, write_clients(tmp_path / "rows", {"apple-1": 20}))
    with pytest.raises(DataError, match="all rows are of one client, 'apple-1'"):
        decide(config, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_without_validation_rows_nothing_is_trained(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    blind = {"data.validation_fraction": 0.0, "rounds.count": 1}
    config = make_config(base_folder, clients_folder, blind)
    with pytest.raises(DataError, match=r"set data\.validation_fraction"):
        decide(config, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_command_prints_the_decisions(compared: Path, tmp_path: Path) -> None:
    ended = call_main("decide", compared, "--output", tmp_path / "out", "--seed", "4")
    assert ended.code == 0, ended.err
    for words in ("together is", "apple-1", "90 % confidence", "decision.html"):
        assert words in ended.out
    ended = call_main("decide", compared, "--output", tmp_path / "out", "--format", "json")
    assert json.loads(ended.out)["seed"] == 3
    ended = call_main("decide", compared, "--set", "rounds.count=1")
    assert ended.code == 2 and "leave --preset and --set away" in ended.err


def test_what_was_taken_is_used_from_the_folder_of_the_decisions(
    decision: Decision, compared: Path, base: BaseModel, tmp_path: Path
) -> None:
    """Each client's adapter is that of the run it was taken from, or half of two."""
    saved = reload_adapters(decision.folder, base)
    assert set(saved.adapters) == set(ROWS)
    for one in decision.decisions.clients:
        choice, client = one.judgement.choice, one.client
        if "+" not in choice:
            run = reload_adapters(compared / f"{choice}-seed3", base)
            assert adapter_equal(saved.adapters[client], run.adapters[client]), client
        deployed = saved.kind.read(decision.folder / "adapters" / client)
        assert adapter_equal(saved.adapters[client], deployed)
    ended = call_main("evaluate", decision.folder, "--format", "json")
    assert ended.code == 0, ended.err
    losses = {each["client"]: each["test_loss"] for each in json.loads(ended.out)}
    for one in decision.decisions.clients:
        assert losses[one.client] == pytest.approx(one.row()["chosen_test_loss"], rel=1e-4)


def adapter_equal(one: Adapter, other: Adapter) -> bool:
    return set(one) == set(other) and all(bool((one[n] == other[n]).all()) for n in one)


@pytest.mark.parametrize("verb", ["chat", "generate", "export"])
def test_verbs_that_use_adapters_take_decisions(
    decision: Decision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\n"))
    words: dict[str, list[Any]] = {
        "chat": ["--client", "apple-1"],
        "generate": ["w1 w2", "--client", "apple-1"],
        "export": ["--client", "apple-1", "--output", tmp_path / "one"],
    }
    ended = call_main(verb, decision.folder, *words[verb])
    assert ended.code == 0, ended.err


def test_decisions_are_verified_with_their_adapters_and_damage_is_not_used(
    decision: Decision, base: BaseModel, tmp_path: Path
) -> None:
    folder = shutil.copytree(decision.folder, tmp_path / "decision")
    found = verify_folder(folder)
    assert not found.damaged and not found.unchecked
    assert "adapters/apple-1/adapter_model.safetensors" in found.checked
    weights = folder / "adapters" / "apple-1" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 16
    weights.write_bytes(content)
    assert len(verify_folder(folder).damaged) == 1


def test_decisions_whose_runs_are_gone_say_so(
    decision: Decision, base: BaseModel, tmp_path: Path
) -> None:
    folder = shutil.copytree(decision.folder, tmp_path / "elsewhere" / "decision")
    with pytest.raises(RunFolderError, match="there is no such folder"):
        reload_adapters(folder, base)
    document = json.loads((folder / "decision.json").read_text(encoding="utf-8"))
    del document["runs"]
    (folder / "decision.json").write_text(json.dumps(document), encoding="utf-8")
    accept_files(folder, ["decision.json"])
    with pytest.raises(RunFolderError, match="older versions.*repeat its fedmira decide"):
        reload_adapters(folder, base)


def test_a_folder_of_rows_is_enough(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that were not given are said where they matter; a name may look like a number."""
    monkeypatch.chdir(tmp_path)
    rows = write_clients(tmp_path / "2024", {"apple-1": 20, "birch-1": 20})
    quick = ["--set", f"model.base={base_folder}", "--set", "rounds.count=2"]
    quick += ["--set", "local.steps=1", "--set", "evaluation.rouge=false"]
    quick += ["--set", "data.max_length=64"]
    ended = call_main("decide", rows, *quick, "--output", tmp_path / "d", "--format", "json")
    assert ended.code == 0, ended.err
    assert "60 % train, 20 % judge and 20 % test" in ended.err
    assert {each["validation_rows"] for each in json.loads(ended.out)["clients"]} == {4}
    ended = call_main("run", rows, *quick, "--output", tmp_path / "run")
    assert ended.code == 0, ended.err
    written = load_config(tmp_path / "run" / "config.toml").data
    assert (written.source, written.path) == ("jsonl", str(rows))
    ended = call_main("check", Path("2024"), *quick)
    assert ended.code == 0, ended.err


def test_an_empty_folder_is_no_rows(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for verb in ("check", "decide", "run"):
        ended = call_main(verb, tmp_path / "empty")
        assert ended.code == 2 and "empty" in ended.err and "Traceback" not in ended.err
