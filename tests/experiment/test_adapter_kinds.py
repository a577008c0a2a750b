"""Whole runs with adapters of every kind.

What is saved is what was measured, for us and for plain PEFT.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from fedmira.adapters import (
    Adapter,
    norm,
    subtract,
    weighted_sum,
)
from fedmira.config import dump_config, load_config
from fedmira.errors import ConfigError, ModelError, RunFolderError
from fedmira.experiment import build_experiment, run_experiment
from fedmira.model import BaseModel
from fedmira.studies import answer, make_plan
from fedmira.studies.saved import clients_of, reload_adapters
from small import call_main, make_config
from tiny import VOCABULARY, tiny_model, tiny_tokenizer

VIRTUAL = 4
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter.kind": "lora"},
    "p-tuning": {"adapter.kind": "p-tuning", "adapter.encoder_hidden": 16},
    "prompt": {"adapter.kind": "prompt", "local.learning_rate": 0.1},
    "prefix": {
        "adapter.kind": "prefix",
        "adapter.prefix_projection": True,
        "adapter.encoder_hidden": 16,
    },
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def settings(kind: str, **more: Any) -> dict[str, Any]:
    common = {
        "adapter.virtual_tokens": VIRTUAL,
        "algorithm.name": "fedavg",
        "rounds.count": 2,
        "data.clients": 3,
        "evaluation.rouge": True,
    }
    return {
        **common,
        **KINDS[kind],
        **{key.replace("__", "."): value for key, value in more.items()},
    }


@every_kind
def test_a_run_saves_what_it_measured(
    kind: str, base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(base_folder, clients_folder, settings(kind, local__steps=6))
    result = run_experiment(build_experiment(config, base), tmp_path / "run")
    assert result.summary["after_align_loss"]["mean"] < result.summary["base_loss"]["mean"]

    saved = reload_adapters(tmp_path / "run")
    evaluator = clients_of(saved)
    again = evaluator.losses(saved.adapters)
    index = json.loads((tmp_path / "run" / "adapters" / "index.json").read_text(encoding="utf-8"))
    for row in result.clients:
        client = row["client"]
        assert again[client].per_token == pytest.approx(row["after_align_loss"], rel=1e-6)
        assert row["rank"] == (4 if kind == "lora" else 0)
        assert index[client]["parameters"] == sum(
            tensor.numel() for tensor in result.adapters[client].values()
        )

    client = result.clients[0]["client"]
    model = peft.PeftModel.from_pretrained(
        tiny_model("llama"), str(tmp_path / "run" / "adapters" / client)
    ).eval()
    rows = evaluator.data[client].test
    total = 0.0
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.response]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[
                0, -ids.shape[1] :
            ]
        at = slice(len(row.prompt) - 1, ids.shape[1] - 1)
        total += float(
            torch.nn.functional.cross_entropy(
                logits[at], ids[0, len(row.prompt) :], reduction="sum"
            )
        )
    assert total / sum(len(row.response) for row in rows) == pytest.approx(
        result.clients[0]["after_align_loss"], rel=1e-5
    )

    text = answer(saved, client, "w1 w2 w3")
    assert isinstance(text, str) and answer(saved, client, "w1 w2 w3") == text


def test_fedptuning_averages_the_encoders_by_rows(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    """One round of FedPTuning is the mean of what the clients reach alone.

    Parameter by parameter of the encoder.
    """
    runs = {}
    for name in ("local", "fedavg"):
        config = make_config(
            base_folder,
            clients_folder,
            settings("p-tuning", algorithm__name=name, rounds__count=1, evaluation__rouge=False),
        )
        runs[name] = run_experiment(build_experiment(config, base), tmp_path / name)
    rows = [row["train_rows"] for row in runs["local"].clients]
    alone: list[Adapter] = [runs["local"].adapters[row["client"]] for row in runs["local"].clients]
    mean = weighted_sum(alone, [count / sum(rows) for count in rows])
    for row in runs["fedavg"].clients:
        shared = runs["fedavg"].adapters[row["client"]]
        assert {"prompt_encoder.embedding.weight", "prompt_encoder.mlp_head.4.bias"} <= set(shared)
        assert norm(subtract(shared, mean)) < 1e-6 * norm(mean)


@pytest.mark.parametrize(("kind", "graph"), [("p-tuning", "similarity"), ("prefix", "uniform")])
def test_mira_pulls_encoders_together(
    kind: str, graph: str, base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    more = {
        "algorithm__name": "mira",
        "algorithm__space": "factor",
        "graph__kind": graph,
        "rounds__count": 3,
        "evaluation__rouge": False,
    }
    result = run_experiment(
        build_experiment(make_config(base_folder, clients_folder, settings(kind, **more)), base),
        tmp_path / "run",
    )
    events = [
        json.loads(line)
        for line in (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert (
        max(
            event["relative_pull"]
            for event in events
            if event["event"] == "align" and "relative_pull" in event
        )
        > 0
    )
    assert result.graph is not None and len(result.graph.edge_list)


@pytest.mark.parametrize("kind", ["p-tuning", "prompt", "prefix"])
def test_the_command_line_runs_the_demo_and_answers(
    kind: str, base_folder: Path, tmp_path: Path
) -> None:
    """The demo's words are unknown to the tiny tokenizer, which makes one token of each."""
    changes = [
        f"model.base={base_folder}", "model.device=cpu",
        f"adapter.kind={kind}", f"adapter.virtual_tokens={VIRTUAL}", "algorithm.name=fedavg",
        "data.clients=3", "data.max_rows=4", "data.test_rows=2", "data.max_length=96",
        "rounds.count=1", "local.steps=2", "evaluation.max_new_tokens=3",
    ]  # fmt: skip
    options = [part for change in changes for part in ("--set", change)]
    ended = call_main("check", *options)
    assert ended.code == 0 and f"adapter: {VIRTUAL} virtual tokens" in ended.out
    ended = call_main("run", "--output", tmp_path / "run", *options)
    assert ended.code == 0, ended.err
    client = json.loads((tmp_path / "run" / "adapters" / "index.json").read_text(encoding="utf-8"))
    ended = call_main("generate", tmp_path / "run", "--client", next(iter(client)), "a letter")
    assert ended.code == 0, ended.err
    ended = call_main("evaluate", tmp_path / "run", "--format", "json")
    assert ended.code == 0 and len(json.loads(ended.out)) == 3


def test_virtual_tokens_and_rows_must_fit_the_context_together(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    fitting = make_config(
        base_folder, clients_folder, settings("prompt", data__max_length=128 - VIRTUAL)
    )
    assert make_plan(build_experiment(fitting, base)).adapter_parameters == VIRTUAL * 32
    for kind in ("prompt", "prefix", "p-tuning"):
        config = make_config(
            base_folder, clients_folder, settings(kind, data__max_length=128 - VIRTUAL + 1)
        )
        with pytest.raises(
            ConfigError,
            match=r"max_length is 125 beside adapter.virtual_tokens = 4, but .* reads at most "
            r"128 .* 124 or less",
        ):
            build_experiment(config, base)
    config = make_config(
        base_folder, clients_folder, settings("prompt", adapter__virtual_tokens=125)
    )
    with pytest.raises(ConfigError, match="lower adapter.virtual_tokens"):
        build_experiment(config, base)


def test_an_architecture_without_attention_is_refused_when_it_is_loaded(
    base_folder: Path, clients_folder: Path
) -> None:
    model = MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    ).eval()
    base = BaseModel(model.requires_grad_(False), tiny_tokenizer(), "tiny mamba", "tiny mamba", "")
    with pytest.raises(
        ModelError,
        match=r"adapter.kind = 'prefix' does not work on MambaForCausalLM .*; set adapter.kind "
        r"to 'lora'",
    ):
        build_experiment(make_config(base_folder, clients_folder, settings("prefix")), base)


def test_a_folder_without_its_encoder_says_so(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(
        base_folder, clients_folder, settings("prompt", rounds__count=1, evaluation__rouge=False)
    )
    result = run_experiment(build_experiment(config, base), tmp_path / "run")
    client = result.clients[0]["client"]
    (tmp_path / "run" / "adapters" / client / "encoder.safetensors").unlink()
    with pytest.raises(RunFolderError, match=r"encoder.safetensors: there is no adapter"):
        result.adapters[client]


def test_settings_of_a_kind_survive_a_config_file(tmp_path: Path) -> None:
    config = load_config(
        overrides=[
            "adapter.kind=p-tuning",
            "adapter.encoder=lstm",
            "adapter.encoder_hidden=7",
            "algorithm.name=fedavg",
        ]
    )
    (tmp_path / "run.toml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "run.toml") == config
