"""The run folder is relied on from outside.

Every file, key and number of it, read back with other tools than those that wrote it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmira.config import load_config
from fedmira.errors import ConfigError, RunFolderError
from fedmira.experiment import Experiment, build_experiment, run_experiment
from fedmira.model import BaseModel
from fedmira.runs import Result
from fedmira.studies import answer
from fedmira.studies.saved import clients_of, reload_adapters
from small import CLIENTS, adapters_of, events_of, make_config, table_of

Finished = tuple[Experiment, Result]
PEFT_WARNING = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks transformers for it


@pytest.fixture(scope="module")
def finished(
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    """A run with all parts.

    Learned graph, several ranks, evaluation on the way, generation at the end.
    """
    settings = {
        "evaluation.every": 1,
        "evaluation.rouge": True,
        "adapter.ranks": {"birch-1": 2},
        "rounds.participation": 0.8,
        "rounds.count": 4,
    }
    experiment = build_experiment(make_config(base_folder, clients_folder, settings), base)
    return experiment, run_experiment(experiment, tmp_path_factory.mktemp("contract") / "run")


@pytest.fixture(scope="module")
def folder(finished: Finished) -> Path:
    return finished[1].folder


def document(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_file_of_the_contract_is_there_and_no_other(folder: Path) -> None:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    adapters = {
        f"adapters/{client}/{name}"
        for client in CLIENTS
        for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")
    }
    tables = {f"metrics/{name}.csv" for name in ("clients", "rounds", "validation")}
    checkpoint = {
        f"checkpoint/round-{number}/{name}"
        for number in ("000003", "000004")
        for name in ("numbers.safetensors", "values.json", "graph.json", "hashes.sha256")
    }
    stored = {
        name
        for name in found
        if re.fullmatch(r"checkpoint/adapters/[0-9a-f]{64}\.safetensors", name)
    }
    assert len(CLIENTS) <= len(stored) <= 6 * len(CLIENTS), (
        "of each client: as it is, as it was sent, as it was best; in the last two rounds"
    )
    assert found - stored == {
        "config.toml",
        "run.json",
        "events.jsonl",
        "graph.json",
        "report.html",
        ".lock",
        *adapters,
        "adapters/index.json",
        *tables,
        *checkpoint,
        "checkpoint/run.json",
        "hashes.sha256",
    }


def test_the_config_on_disk_is_the_one_that_ran(finished: Finished, folder: Path) -> None:
    assert load_config(folder / "config.toml") == finished[0].config


def test_run_json_says_what_ran_where(finished: Finished, folder: Path) -> None:
    experiment, result = finished
    provenance = document(folder / "run.json")
    assert (
        provenance["status"],
        provenance["error"],
        provenance["seed"],
        provenance["rounds_done"],
        provenance["clients"],
    ) == (
        "finished",
        None,
        0,
        4,
        5,
    )
    assert {"fedmira", "python", "torch", "transformers", "peft"} <= set(
        provenance["versions"]
    ) and provenance["versions"]["torch"] == torch.__version__
    assert (
        provenance["base"]["sha256"] == experiment.base.sha256 and len(experiment.base.sha256) == 64
    )
    assert provenance["base"]["parameters"] == sum(
        parameter.numel() for parameter in experiment.base.model.parameters()
    )
    paths = {
        name: provenance["base"][name] for name in ("packed", "kernels", "shortened_last_layer")
    }
    assert paths == dict.fromkeys(paths, True), "the tiny Llama is trained the fastest way there is"
    assert provenance["base"]["attention"] == "blocks"
    assert "attention_in_windows" not in provenance["base"]
    assert {"cpu", "cores", "platform", "device"} <= set(provenance["machine"]) and provenance[
        "machine"
    ]["device"] == "cpu"
    assert provenance["wall_seconds"] > 0 and provenance["started"] and provenance["resumed"] == []
    assert provenance["summary"] == result.summary


def test_clients_csv_has_the_promised_columns_and_the_headline_is_their_mean(
    finished: Finished, folder: Path
) -> None:
    rows = table_of(folder, "clients")
    promised = [
        "client",
        "task",
        "category",
        "rank",
        "train_rows",
        "test_rows",
        "test_tokens",
        "base_loss",
        "before_align_loss",
        "after_align_loss",
    ]
    assert set(promised) | {
        "rouge_l",
        "rouge_l_package",
        "exact_match",
        "best_round",
        "rounds_trained",
    } <= set(rows[0])
    assert [row["client"] for row in rows] == sorted(CLIENTS) and [row["rank"] for row in rows] == [
        "4",
        "4",
        "4",
        "2",
        "4",
    ]
    assert [row["category"] for row in rows] == ["apple"] * 3 + ["birch"] * 2
    summary = document(folder / "run.json")["summary"]
    for name in ("base_loss", "after_align_loss"):
        values, tokens = (
            [float(row[name]) for row in rows],
            [int(row["test_tokens"]) for row in rows],
        )
        assert summary[name]["mean"] == pytest.approx(statistics.fmean(values), rel=1e-12)
        assert summary[name]["weighted_mean"] == pytest.approx(
            statistics.fmean(values, tokens), rel=1e-12
        )
        assert summary[name]["worst_tenth"] == max(values)  # one of five
        assert summary[name]["spread"] == pytest.approx(statistics.pstdev(values), rel=1e-9)
    trained = [event["client"] for event in events_of(folder, "train")]
    assert {row["client"]: int(row["rounds_trained"]) for row in rows} == {
        client: trained.count(client) for client in CLIENTS
    }


def test_rounds_csv_has_a_row_a_round_that_follows_from_the_events(folder: Path) -> None:
    rows = table_of(folder, "rounds")
    assert [row["round"] for row in rows] == ["1", "2", "3", "4"]
    columns = "train_loss train_loss_weighted test_loss test_loss_weighted "
    columns += "disagreement_before disagreement_after pull"
    columns += " train_seconds evaluate_seconds tokens_per_second"
    assert set(columns.split()) <= set(rows[0])
    for row in rows:
        trains = [
            event for event in events_of(folder, "train") if event["round"] == int(row["round"])
        ]
        tests = [
            event for event in events_of(folder, "evaluate") if event["round"] == int(row["round"])
        ]
        losses, tokens = (
            [event["loss"] for event in trains],
            [event["response_tokens"] for event in trains],
        )
        assert int(row["clients"]) == len(trains) == 4  # 0.8 of 5
        assert float(row["train_loss"]) == pytest.approx(statistics.fmean(losses), rel=1e-12)
        assert float(row["train_loss_weighted"]) == pytest.approx(
            statistics.fmean(losses, tokens), rel=1e-12
        )
        assert float(row["test_loss"]) == pytest.approx(
            statistics.fmean(event["test_loss"] for event in tests), rel=1e-12
        )
        weighted = statistics.fmean(
            [event["test_loss"] for event in tests], [event["test_tokens"] for event in tests]
        )
        assert float(row["test_loss_weighted"]) == pytest.approx(weighted, rel=1e-12)
        assert float(row["disagreement_after"]) <= float(row["disagreement_before"]) * (1 + 1e-9)
        assert int(row["bytes_up"]) == sum(event["bytes_up"] for event in trains)
        assert float(row["tokens_per_second"]) > 0
    assert float(rows[0]["pull"]) == 0 and all(float(row["pull"]) > 0 for row in rows[1:]), (
        "a warm-up round, then motion"
    )


def test_events_carry_the_promised_keys_in_the_order_of_the_rounds(folder: Path) -> None:
    events = events_of(folder)
    assert [event["round"] for event in events] == sorted(event["round"] for event in events)
    assert {event["event"] for event in events} == {"evaluate", "train", "align", "round"}
    for event in events_of(folder, "train"):
        assert {
            "round",
            "client",
            "loss",
            "response_tokens",
            "tokens",
            "bytes_up",
            "bytes_down",
            "loaded_hash",
            "sent_hash",
        } <= set(event)
        rank = 2 if event["client"] == "birch-1" else 4
        # q_proj 32 to 32 and v_proj 32 to 16 in two layers, float32, each way.
        assert event["bytes_up"] == event["bytes_down"] == 4 * 2 * rank * ((32 + 32) + (32 + 16))
    for event in events_of(folder, "align"):
        assert {"pull", "relative_pull", "degree", "saved_hash"} <= set(event)


def test_the_graph_lists_a_pair_once_and_is_the_one_in_python(
    finished: Finished, folder: Path
) -> None:
    graph = document(folder / "graph.json")
    assert (
        graph["kind"] == "similarity"
        and graph["clients"] == sorted(CLIENTS)
        and graph["round"] == 4
    )
    pairs = [frozenset((edge["source"], edge["target"])) for edge in graph["edges"]]
    assert len(pairs) == len(set(pairs)) > 0 and all(
        len(pair) == 2 and pair <= set(CLIENTS) for pair in pairs
    )
    assert all(edge["weight"] > 0 for edge in graph["edges"])
    kept = finished[1].graph
    assert (
        kept is not None
        and [(edge["source"], edge["target"], edge["weight"]) for edge in graph["edges"]]
        == kept.edges()
    )


def test_hashes_in_the_index_are_those_of_the_files(finished: Finished, folder: Path) -> None:
    index = document(folder / "adapters" / "index.json")
    rows = {row["client"]: row for row in table_of(folder, "clients")}
    assert list(index) == sorted(CLIENTS)
    for client, entry in index.items():
        tensors = load_file(folder / "adapters" / client / "adapter_model.safetensors")
        hasher = hashlib.sha256()
        for name in sorted(tensors):
            hasher.update(
                f"{name} {tensors[name].shape} torch.float32".encode() + tensors[name].tobytes()
            )
        assert entry["sha256"] == hasher.hexdigest()
        assert entry["base_sha256"] == finished[0].base.sha256
        assert (entry["task"], entry["category"]) == (
            rows[client]["task"],
            client.partition("-")[0],
        )
        assert (str(entry["rank"]), str(entry["rounds_trained"])) == (
            rows[client]["rank"],
            rows[client]["rounds_trained"],
        )
        assert entry["metrics"]["after_align_loss"] == float(rows[client]["after_align_loss"])
        assert {"base_loss", "rouge_l", "exact_match"} <= set(entry["metrics"])


def test_python_gets_what_is_on_disk(finished: Finished, folder: Path) -> None:
    result = finished[1]
    assert result.report == folder / "report.html" and result.report.is_file()
    on_disk = adapters_of(folder)
    for client, adapter in result.adapters.items():
        assert all(
            (tensor.double().numpy() == on_disk[client][name]).all()
            for name, tensor in adapter.items()
        )
    with (folder / "metrics" / "clients.csv").open(encoding="utf-8", newline="") as file:
        assert [{key: str(value) for key, value in row.items()} for row in result.clients] == list(
            csv.DictReader(file)
        )


@PEFT_WARNING
def test_saved_adapters_give_the_reported_loss_with_plain_peft_and_padded_batches(
    finished: Finished, folder: Path, base_folder: Path
) -> None:
    reported = {
        row["client"]: float(row["after_align_loss"]) for row in table_of(folder, "clients")
    }
    for client in CLIENTS:
        settings = document(folder / "adapters" / client / "adapter_config.json")
        assert settings["peft_type"] == "LORA" and settings["base_model_name_or_path"] == str(
            base_folder
        )
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32),
            folder / "adapters" / client,
        ).eval()
        rows = finished[0].clients.data[client].test
        size = max(len(row.prompt) + len(row.response) for row in rows)
        ids, labels, seen = (torch.full((len(rows), size), fill) for fill in (0, -100, 0))
        for j, row in enumerate(rows):
            length = len(row.prompt) + len(row.response)
            ids[j, :length] = torch.tensor([*row.prompt, *row.response])
            labels[j, len(row.prompt) : length] = torch.tensor(row.response)
            seen[j, :length] = 1
        with torch.no_grad():
            loss = float(model(input_ids=ids, attention_mask=seen, labels=labels).loss)
        assert loss == pytest.approx(reported[client], rel=1e-4)


def test_test_rows_are_those_of_the_files(
    finished: Finished, clients_folder: Path, base_folder: Path
) -> None:
    """What the losses are computed on.

    Prompt and response of lines that stand in the client's own file, in nobody's training rows.
    """
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    for client, data in finished[0].clients.data.items():
        lines = [
            json.loads(line)
            for line in (clients_folder / client / "train.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        ]
        texts = {(f"{line['instruction']} {line['input']}", line["output"]) for line in lines}
        decoded = [
            (tokenizer.decode(row.prompt), tokenizer.decode(row.response, skip_special_tokens=True))
            for row in data.test
        ]
        assert decoded and set(decoded) <= texts
        assert [response for _, response in decoded] == list(data.references)
        assert not {row.prompt for row in data.test} & {
            row.prompt for row in (*data.train, *data.validation)
        }


@pytest.fixture(scope="module")
def saved(folder: Path) -> Any:
    return reload_adapters(folder)


def test_a_finished_run_is_measured_again_with_the_same_figures(saved: Any, folder: Path) -> None:
    evaluator = clients_of(saved)
    losses = evaluator.losses(saved.adapters)
    texts = evaluator.score(saved.adapters, saved.config.evaluation.max_new_tokens)
    for row in table_of(folder, "clients"):
        assert losses[row["client"]].per_token == pytest.approx(
            float(row["after_align_loss"]), rel=1e-6
        )
        assert texts[row["client"]]["rouge_l"] == float(row["rouge_l"])


@PEFT_WARNING
def test_a_client_answers_as_its_adapter_does_with_plain_peft(
    saved: Any, folder: Path, base_folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    instruction = clients_of(saved).data["apple-2"].instruction
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32),
        folder / "adapters" / "apple-2",
    ).eval()
    for text in ("w5 w6", "w70 w1 w33"):
        ids = tokenizer(f"{instruction} {text}", add_special_tokens=False)["input_ids"]
        start = len(ids)
        for _ in range(4):
            with torch.no_grad():
                following = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if following == tokenizer.eos_token_id:
                break
            ids.append(following)
        assert (
            answer(saved, "apple-2", text)
            == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
        )
    assert (
        len(answer(saved, "apple-2", "w5 w6", instruction="w1 w2", max_new_tokens=1).split()) <= 1
    )


def test_asking_a_client_that_does_not_exist_lists_those_that_do(saved: Any) -> None:
    with pytest.raises(
        ConfigError, match="no client 'cherry-1' in this run; its clients are apple-1, apple-2"
    ):
        answer(saved, "cherry-1", "w1")


def test_adapters_of_another_base_are_refused(
    base: BaseModel, clients_folder: Path, tmp_path: Path
) -> None:
    from small import write_base
    from tiny import tiny_model

    place = write_base(tmp_path / "base")
    config = make_config(place, clients_folder, {"rounds.count": 1, "algorithm.name": "local"})
    run_experiment(build_experiment(config, base), tmp_path / "run")
    tiny_model("llama", seed=3).save_pretrained(place)
    with pytest.raises(RunFolderError, match="was trained on another base"):
        reload_adapters(tmp_path / "run")


def test_a_run_that_has_saved_nothing_yet_says_how_to_finish_it(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("", encoding="utf-8")
    with pytest.raises(
        RunFolderError,
        match="has saved no adapters yet; finish it with: fedmira run --resume --output",
    ):
        reload_adapters(tmp_path)
