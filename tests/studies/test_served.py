"""`fedmira serve-config`: every file is what its reader takes, and asks as training did."""

from __future__ import annotations

import json
import math
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fedmira
from fedmira.data import PROMPTS, Example
from fedmira.errors import ConfigError, RunError
from fedmira.studies.serving.server_checks import (
    filled,
    problems_of_llama,
    problems_of_vllm,
    read_modelfile,
)
from fedmira.studies.serving.server_files import ServedClient, ollama_texts, vllm_script
from small import CLIENTS, call_main, make_run
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def served(shared_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("served") / "files"
    ended = call_main("serve-config", shared_run, "--output", output, "--format", "json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert document["notes"] == [] and "vllm/serve.sh" in document["files"]
    return output


def words(script: Path) -> list[str]:
    return shlex.split(script.read_text("utf-8").replace("\\\n", " "), comments=True)


def test_vllm_is_told_every_adapter_by_the_name_of_its_folder(
    served: Path, base_folder: Path
) -> None:
    said = words(served / "vllm" / "serve.sh")
    start = said.index("--lora-modules")
    modules = [json.loads(word) for word in said[start + 1 :]]
    assert {module["name"] for module in modules} == set(CLIENTS)
    assert {module["base_model_name"] for module in modules} == {str(base_folder.resolve())}
    assert said[said.index("serve") + 1] == str(base_folder.resolve())
    assert said[said.index("--max-lora-rank") + 1] == "8"  # the least that holds rank 4
    for module in modules:  # the resolver's rule
        config = json.loads((served / module["path"] / "adapter_config.json").read_text("utf-8"))
        assert config["peft_type"] == "LORA"
        assert config["base_model_name_or_path"] == str(base_folder.resolve())


@pytest.mark.parametrize("script", ["vllm/serve.sh", "vllm/serve_resolver.sh"])
def test_a_damaged_folder_is_found(served: Path, tmp_path: Path, script: str) -> None:
    copied = shutil.copytree(served, tmp_path / "copy")
    assert problems_of_vllm(copied, script) == [] == problems_of_llama(copied)
    config = copied / "adapters" / "apple-1" / "adapter_config.json"
    broken = json.loads(config.read_text("utf-8")) | {"base_model_name_or_path": "other", "r": 99}
    config.write_text(json.dumps(broken), encoding="utf-8")
    (copied / "chat_template.jinja").unlink()
    found = " ".join(problems_of_vllm(copied, script))
    assert "base_model_name_or_path is 'other'" in found and "above --max-lora-rank" in found
    assert "there is no chat_template.jinja" in found


def test_the_scripts_are_shell(served: Path) -> None:
    for script in sorted(served.glob("*/*.sh")):
        assert subprocess.run(["sh", "-n", script], check=False).returncode == 0


def test_the_program_for_peft_answers_as_the_run(served: Path, shared_run: Path) -> None:
    program = runpy.run_path(str(served / "transformers" / "load.py"))
    model, tokenizer = program["load"]()
    result = fedmira.load(shared_run)
    for client in ("apple-1", "birch-2"):
        for text in ("w4 w8", "w70 w2"):
            answer = program["ask"](model, tokenizer, client, text)
            assert answer == result.generate(client, text)


def test_a_modelfile_asks_as_training_did(served: Path) -> None:
    about = json.loads((served / "clients.json").read_text("utf-8"))["clients"]["apple-3"]
    instruction = about["messages"][0]["content"]
    text = (served / "ollama" / "apple-3.Modelfile").read_text("utf-8")
    found = read_modelfile(text)
    assert found["FROM"] == ["../llama_cpp/base.gguf"] and found["SYSTEM"] == [instruction]
    assert found["ADAPTER"] == ["../llama_cpp/apple-3.gguf"]
    asked = filled(found["TEMPLATE"][0], instruction, "w5 {{ .System }}")
    example = Example(instruction, "w5 {{ .System }}", "")
    assert asked == PROMPTS["alpaca"](example, tiny_tokenizer())
    with pytest.raises(RunError, match="does not end"):
        read_modelfile('TEMPLATE """one')
    with pytest.raises(RunError, match="no instruction of a Modelfile"):
        read_modelfile("ADAPT here")


def test_what_ollamas_fields_cannot_say_gets_no_modelfile() -> None:
    from fedmira.data import Encoder

    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, "alpaca", 64)
    shared = {"instruction": 'end it with """'}
    assert ollama_texts("alpaca", tokenizer, encoder, shared) is None
    assert ollama_texts("alpaca", tokenizer, encoder, {"instruction": ""}) is not None


def test_rank_stabilised_adapters_are_written_as_others_read_them(
    lone_run: Path, base_folder: Path, tmp_path: Path
) -> None:
    """llama.cpp scales by alpha / r alone: the same product needs alpha times the root of r."""
    fedmira.load(lone_run).serve_config(tmp_path / "files", clients=["apple-1"])
    place = tmp_path / "files" / "adapters" / "apple-1"
    config = json.loads((place / "adapter_config.json").read_text("utf-8"))
    assert not config["use_rslora"]
    assert config["lora_alpha"] / config["r"] == pytest.approx(8.0 / math.sqrt(4))
    ids = torch.tensor([[1, 5, 9, 40, 7]])
    logits = []
    for folder in (place, lone_run / "adapters" / "apple-1"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder)
        logits.append(model(input_ids=ids).logits)
    assert torch.allclose(*logits, atol=1e-5)
    own = load_file(lone_run / "adapters" / "apple-1" / "adapter_model.safetensors")
    assert all(
        torch.equal(tensor, own[name])
        for name, tensor in load_file(place / "adapter_model.safetensors").items()
    )


def test_layers_that_are_stored_turned_are_served_by_peft_alone(
    clients_folder: Path, tmp_path: Path
) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    settings: dict[str, Any] = {"rounds.count": 1, "algorithm.name": "local"}
    run = make_run(tmp_path / "base", clients_folder, tmp_path / "run", settings)
    found = fedmira.load(run).serve_config(tmp_path / "files")
    assert not any(name.startswith(("vllm", "llama_cpp", "ollama")) for name in found.files)
    assert "transformers/load.py" in found.files and "--merged" in found.notes[0]


def test_conversations_have_a_template_of_their_own(base_folder: Path, tmp_path: Path) -> None:
    talk = [
        {
            "messages": [
                {"role": "system", "content": "w9"},
                {"role": "user", "content": f"w{n}"},
                {"role": "assistant", "content": f"w{n + 1}"},
                {"role": "user", "content": f"w{n + 2}"},
                {"role": "assistant", "content": f"w{n + 3}"},
            ]
        }
        for n in range(12)
    ]
    rows = [{"instruction": "w1", "input": f"w{n}", "output": f"w{n + 1}"} for n in range(12)]
    result = fedmira.run(
        clients={"north": rows, "south": talk},
        method="local",
        settings={
            "model.base": str(base_folder),
            "data.prompt": "plain",
            "rounds.count": 1,
            "local.steps": 1,
            "data.max_length": 64,
            "evaluation.rouge": False,
            "model.device": "cpu",
        },
        output=tmp_path / "run",
    )
    found = result.serve_config(tmp_path / "files")
    about = json.loads((tmp_path / "files" / "clients.json").read_text("utf-8"))["clients"]
    assert about["south"]["chat_template"] == "chat_template.conversations.jinja"
    assert about["north"]["chat_template"] == "chat_template.jinja"
    assert any("template of their own" in note for note in found.notes)


def test_ranks_above_vllms_are_refused() -> None:
    client = ServedClient("a", 600, {}, [], "")
    with pytest.raises(ConfigError, match="serves at most 512"):
        vllm_script("base", [client], "")


def test_other_kinds_are_for_peft_alone(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "adapter.kind": "prompt",
        "algorithm.name": "local",
        "rounds.count": 1,
        "local.steps": 1,
    }
    run = make_run(base_folder, clients_folder, tmp_path / "run", settings)
    ended = call_main("serve-config", run, "-o", tmp_path / "files")
    assert ended.code == 2 and "use fedmira export" in ended.err
    assert not (tmp_path / "files").exists()
