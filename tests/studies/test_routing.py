"""`fedmira route`: clients ranked by the loss of a text or of rows under their adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedmira
from fedmira.data import PROMPTS, Example
from fedmira.errors import ConfigError
from small import CLIENTS, call_main


def peft_loss(run: Path, base: Path, client: str, prompt: str, answer: str) -> float:
    """Nats a token of an answer and its end, by plain PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(plain, run / "adapters" / client).eval()
    head, tail = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer))
    ids = torch.tensor([[*head, *tail, tokenizer.eos_token_id]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(head) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, len(head) :]))


def test_rows_are_measured_as_plain_peft_measures_them(
    shared_run: Path, base_folder: Path, tmp_path: Path
) -> None:
    row = {"instruction": "w1 w2", "input": "w8 w9", "output": "w60 w61"}
    file = tmp_path / "few.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    ended = call_main("route", shared_run, "--rows", file, "--format", "json")
    assert ended.code == 0, ended.err
    table = json.loads(ended.out)
    prompt = PROMPTS["alpaca"](Example("w1 w2", "w8 w9", ""), AutoTokenizer)
    wanted = {
        client: peft_loss(shared_run, base_folder, client, prompt, "w60 w61") for client in CLIENTS
    }
    assert [each["client"] for each in table] == sorted(wanted, key=lambda name: wanted[name])
    for each in table:
        assert each["loss"] == pytest.approx(wanted[each["client"]], rel=1e-4)
    frame = fedmira.load(shared_run).route(rows=[row])
    assert frame["loss"].tolist() == [each["loss"] for each in table]


def test_a_text_is_measured_behind_each_clients_own_instruction(
    shared_run: Path, base_folder: Path
) -> None:
    table = fedmira.load(shared_run).route("w8 w9 w3")
    index = json.loads((shared_run / "adapters" / "index.json").read_text("utf-8"))
    for _, row in table.iterrows():
        assert row["tokens"] == 3
        instruction = index[row["client"]]["prompt"]["instruction"]
        prompt = PROMPTS["alpaca"](Example(instruction, "w8 w9 w3", ""), AutoTokenizer)
        before, _, _ = prompt.partition("w8 w9 w3")
        tokenizer = AutoTokenizer.from_pretrained(base_folder)
        head = tokenizer(before, add_special_tokens=False).input_ids
        ids = torch.tensor([[*head, *tokenizer("w8 w9 w3", add_special_tokens=False).input_ids]])
        plain = AutoModelForCausalLM.from_pretrained(base_folder)
        model = PeftModel.from_pretrained(plain, shared_run / "adapters" / row["client"]).eval()
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(head) - 1 : -1]
        wanted = torch.nn.functional.cross_entropy(logits, ids[0, len(head) :])
        assert row["loss"] == pytest.approx(float(wanted), rel=1e-4)


def test_how_little_a_text_tells_is_said(shared_run: Path) -> None:
    ended = call_main("route", shared_run, "w8 w9")
    assert ended.code == 0 and "apple-1" in ended.out and "a text alone tells little" in ended.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give a text or --rows FILE"),
        (("w1", "--rows", "none.jsonl"), "and not both"),
        (("--rows", "none.jsonl"), "there is no such file"),
        ((" ",), "the text is empty"),
        (("w1 " * 200,), "the base reads at most 128"),
    ],
)
def test_wrong_arguments_are_told(shared_run: Path, arguments: tuple[str, ...], words: str) -> None:
    ended = call_main("route", shared_run, *arguments)
    assert ended.code == 2 and words in ended.err and "Traceback" not in ended.err


def test_neither_text_nor_rows_is_refused_from_python(shared_run: Path) -> None:
    with pytest.raises(ConfigError, match="give a text or rows"):
        fedmira.load(shared_run).route()
