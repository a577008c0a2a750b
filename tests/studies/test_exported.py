"""`fedmira export` and `Result.export`: a folder that says what the run says, or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedmira
from fedmira.config import ModelSettings
from fedmira.errors import ConfigError, RunError, RunFolderError
from fedmira.model import load_base
from small import call_main, make_run

ONE_ROUND = {"rounds.count": 1, "algorithm.name": "local"}


def said(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The greedy answer of transformers alone, to a request through the folder's template."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    return str(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def test_a_merged_model_answers_as_the_run_through_its_own_template(
    shared_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "model"
    ended = call_main("export", shared_run, "--client", "apple-2", "--merged", "-o", output)
    assert ended.code == 0 and ended.out == f"{output}\n", ended.err
    assert "writes the prompt of training" in ended.err
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    result = fedmira.load(shared_run)
    for text in ("w4 w8", "w70 w3 w1", "w11"):
        messages = [{"role": "user", "content": text}]
        assert said(model, tokenizer, messages) == result.generate("apple-2", text)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "largest difference of a logit" in card and "[{input}]" not in card
    assert load_base(ModelSettings(base=str(output), device="cpu")).published == ""


def test_a_merged_model_is_a_base_whose_chat_form_is_the_prompt_of_training(
    shared_run: Path, clients_folder: Path, tmp_path: Path
) -> None:
    fedmira.load(shared_run).export("apple-1", tmp_path / "model", merged=True)
    run = make_run(
        tmp_path / "model",
        clients_folder,
        tmp_path / "on-top",
        {
            "data.prompt": "chat",
            "rounds.count": 1,
            "algorithm.name": "local",
        },
    )
    again = fedmira.load(run)
    assert again.status == "finished"
    found = again.export("apple-1", tmp_path / "again", merged=True)
    assert found.chat_template, found.why_not
    own, before = (
        (tmp_path / name / "chat_template.jinja").read_text("utf-8") for name in ("again", "model")
    )
    assert own == before
    files = again.serve_config(tmp_path / "files", clients=["apple-2"])
    assert "chat_template.jinja" in files.files and "ollama/apple-2.Modelfile" in files.files


def test_an_adapter_in_half_precision_tells_what_rounding_changed(
    shared_run: Path, tmp_path: Path
) -> None:
    found = fedmira.load(shared_run).export("birch-1", tmp_path / "adapter", dtype="bfloat16")
    assert found.real_rows and found.chat_template
    assert 0 < found.proof.largest < found.proof.effect
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    told = json.loads((tmp_path / "adapter" / "export.json").read_text("utf-8"))
    assert told["proof"]["largest"] == found.proof.largest and told["dtype"] == "bfloat16"


def test_an_adapter_as_it_is_loads_with_plain_peft(
    shared_run: Path, base_folder: Path, tmp_path: Path
) -> None:
    found = fedmira.load(shared_run).export("birch-1", tmp_path / "adapter")
    assert found.proof.largest == 0.0 < found.proof.effect
    plain = AutoModelForCausalLM.from_pretrained(base_folder)
    model = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    own = fedmira.load(shared_run).adapters["birch-1"]
    there = dict(model.named_parameters())
    for name, tensor in own.items():
        assert torch.equal(there[name.replace(".weight", ".default.weight")], tensor)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--client", "pear"), "there is no client 'pear' in this run; its clients are apple-1"),
        (("--client", "apple-1", "--dtype", "int8"), "must be one of float32, bfloat16, float16"),
    ],
)
def test_wrong_arguments_are_told_and_nothing_is_written(
    shared_run: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    ended = call_main("export", shared_run, *arguments, "-o", tmp_path / "out")
    assert ended.code == 2 and words in ended.err and list(tmp_path.iterdir()) == []


def test_a_taken_folder_is_left_alone(shared_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    with pytest.raises(RunFolderError, match="is there already"):
        fedmira.load(shared_run).export("apple-1", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_that_proves_wrong_does_not_stay(
    shared_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmira.model.kinds import folding

    monkeypatch.setattr(folding, "_fold", lambda *_: None)
    with pytest.raises(RunError, match="this is no rounding"):
        fedmira.load(shared_run).export("apple-1", tmp_path / "out", merged=True)
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_is_gone_is_named(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(base_folder, tmp_path / "base")
    run = make_run(
        base, clients_folder, tmp_path / "run", {"rounds.count": 1, "algorithm.name": "local"}
    )
    shutil.rmtree(base)
    ended = call_main("export", run, "--client", "apple-1", "-o", tmp_path / "out")
    assert ended.code == 2 and "Traceback" not in ended.err and str(base) in ended.err


def test_rows_that_are_gone_are_told(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    rows = shutil.copytree(clients_folder, tmp_path / "rows")
    run = make_run(
        base_folder, rows, tmp_path / "run", {"rounds.count": 1, "algorithm.name": "local"}
    )
    shutil.rmtree(rows)
    found = fedmira.load(run).export("apple-1", tmp_path / "out", merged=True)
    assert not found.real_rows and "made-up requests" in " ".join(found.lines())


def test_what_changes_no_weight_cannot_be_merged(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {"adapter.kind": "prompt", "algorithm.name": "fedavg", "rounds.count": 1}
    run = fedmira.load(make_run(base_folder, clients_folder, tmp_path / "run", settings))
    with pytest.raises(ConfigError, match="change no weight, so there is nothing to merge"):
        run.export("apple-1", tmp_path / "merged", merged=True)
    found = run.export("apple-1", tmp_path / "plain")
    assert found.proof.largest == 0.0 < found.proof.effect
