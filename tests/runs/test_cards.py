"""The card in an adapter folder.

Its code answers as fedmira does, its prompt is that of training, and it tells nothing of the
machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from fedmira.data import PROMPTS, Encoder, Example
from fedmira.experiment import build_experiment, run_experiment
from fedmira.model import BaseModel
from fedmira.runs import AdapterCards
from fedmira.studies import answer
from fedmira.studies.saved import reload_adapters
from small import make_config, write_clients
from tiny import tiny_base, tiny_model, tiny_tokenizer

CHAT = "{% for message in messages %}w5 {{ message['content'] }} {% endfor %}w6 "
ENTRY: Mapping[str, Any] = {"rank": 4, "sha256": "0" * 64, "metrics": {"after_align_loss": 1.25}}
ROW: Mapping[str, Any] = {"train_rows": 8, "test_rows": 3}


def one_of(card: str, language: str = "python") -> str:
    """The code of a card."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)
    return str(block)


def trained(folder: Path, form: str) -> tuple[Path, Path]:
    """A run of a round on a base with a chat template, and the base's folder.

    Every text of the base has a token in front.
    """
    tokenizer, base = tiny_tokenizer(), folder / "base"
    tokenizer.chat_template = CHAT
    model = tiny_model("llama")
    # penalties of the base, which neither fedmira nor the card's code takes up
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.no_repeat_ngram_size = 2
    model.generation_config.min_new_tokens = 3
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    written = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    front = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    written["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [front, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            front,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}},
    }
    (base / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
    settings = {
        "data.prompt": form,
        "data.max_length": 100,
        "rounds.count": 1,
        "algorithm.name": "local",
    }
    config = make_config(base, write_clients(folder / "data"), settings)
    return run_experiment(build_experiment(config), folder / "run").folder, base


@pytest.mark.parametrize("form", sorted(PROMPTS))
def test_the_code_of_a_card_answers_as_fedmira_does(form: str, tmp_path: Path) -> None:
    run, base = trained(tmp_path, form)
    folder = run / "adapters" / "apple-1"
    code = one_of((folder / "README.md").read_text(encoding="utf-8"))
    filled = {"THIS FOLDER": str(folder), "FOLDER OR HUB ID OF THE BASE": str(base)}
    for place, value in filled.items():
        assert code.count(place) == 1
        code = code.replace(place, value)
    head, bracket, tail = code.rpartition(".format(") if form != "chat" else ("", "", code)
    code = head + bracket + tail.replace("{instruction}", "w1 w2 w3").replace("{input}", "w20 w31")
    out = StringIO()
    with redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    expected = answer(reload_adapters(run), "apple-1", "w20 w31", instruction="w1 w2 w3")
    assert expected and out.getvalue() == expected + "\n"
    assert ("[1] + tokenizer" in code) == (form != "chat"), (
        "the chat template writes its own special tokens"
    )


@pytest.mark.parametrize(
    ("form", "material"), [("alpaca", "left"), ("alpaca", ""), ("plain", "left"), ("plain", "")]
)
def test_the_strings_of_a_card_are_the_prompts_of_training(form: str, material: str) -> None:
    base, config = tiny_base(), make_config("bundled", "data", {"data.prompt": form})
    card = AdapterCards(config, base).text("one", ENTRY, ROW)
    with_input, without = [
        json.loads(line) for line in re.findall(r'^    (".*")$', card, re.MULTILINE)
    ]
    found = (with_input if material else without).format(instruction="Turn {it}.", input=material)
    assert found == PROMPTS[form](Example("Turn {it}.", material, ""), base.tokenizer)
    assert Encoder(base.tokenizer, form, 64).prompt(Example("Turn {it}.", material, "")) == tuple(
        base.tokenizer(found)["input_ids"]
    )
    assert "at most 64 tokens" in card


def test_equal_runs_in_other_folders_have_equal_cards_without_a_path(tmp_path: Path) -> None:
    cards = []
    for place in ("here", "there"):
        run, _ = trained(tmp_path / place, "plain")
        cards.append(
            {
                path.parent.name: path.read_bytes()
                for path in sorted(run.glob("adapters/*/README.md"))
            }
        )
    assert cards[0] == cards[1] and len(cards[0]) == 5
    assert not any(str(tmp_path).encode() in card for card in cards[0].values())
    index = json.loads(
        (tmp_path / "here" / "run" / "adapters" / "index.json").read_text(encoding="utf-8")
    )
    for client, entry in index.items():
        text = cards[0][client].decode()
        assert (
            entry["sha256"] in text
            and entry["base_sha256"] in text
            and f"# Adapter of {client}" in text
        )
        assert (
            f"| `after_align_loss` | {entry['metrics']['after_align_loss']:.4f} |" in text
            and "`local`" in text
        )


def named(base: BaseModel, name: str, location: str) -> str:
    """The card of an adapter on a base of this name."""
    return AdapterCards(
        make_config(name, "data"), replace(base, name=name, location=location)
    ).text("one", ENTRY, ROW)


def test_a_base_is_named_for_the_hub_only_where_it_is_from_there() -> None:
    base = tiny_base()
    assert named(base, "owner/small-model", "owner/small-model").startswith(
        '---\nbase_model: "owner/small-model"\nlibrary_name: peft\n'
    )
    for name, location in (
        ("bundled", "/opt/fedmira/bundled/base"),
        ("models/big", "/srv/models/big"),
        ("/srv/big", "/srv/big"),
    ):
        card = named(base, name, location)
        assert (
            card.startswith("---\nlibrary_name: peft\n")
            and "/opt" not in card
            and "/srv" not in card
        )
    assert "a local folder called `big`" in named(base, "models/big", "/srv/models/big")


def test_a_card_says_which_round_the_adapter_is_of() -> None:
    base = tiny_base()
    last = AdapterCards(make_config("bundled", "data"), base).text("one", ENTRY, ROW)
    best = AdapterCards(make_config("bundled", "data", {"evaluation.select": "best"}), base).text(
        "one", ENTRY, ROW
    )
    assert (
        "after the last complete round" in last
        and "lowest loss on the client's own validation rows" in best
    )
