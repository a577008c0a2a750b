"""What the tests of this folder are made of: small bases, rows of clients, and commands.

The rows are about a greenhouse, so that no text of a user's report stands in them.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from data.templates import byte_tokenizer
from fedmira.data import ClientData, Dataset, EncodedExample
from small import Ended, call_main

__all__ = [
    "BED",
    "Asked",
    "Reads",
    "base_that_says",
    "byte_tokenizer",
    "call",
    "card_says",
    "chat_ids",
    "check",
    "noted",
    "options",
    "refused",
    "run",
    "run_json",
    "split_answer",
    "watering",
    "write_base",
    "write_clients",
    "write_lines",
    "write_random_base",
]

BED = {
    "model.device": "cpu",
    "algorithm.name": "local",
    "rounds.count": 1,
    "local.steps": 1,
    "local.batch_size": 2,
    "evaluation.every": 0,
    "evaluation.rouge": False,
    "evaluation.max_new_tokens": 4,
    "adapter.rank": 2,
    "engine.token_budget": 1024,
    "data.source": "jsonl",
}
"""Settings of runs of a fraction of a second."""


def write_base(folder: Path, model: Any, tokenizer: Any) -> Path:
    """A model and its tokenizer in Hugging Face format."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_random_base(
    folder: Path,
    tokenizer: Any = None,
    config: Any = None,
    generation: Mapping[str, Any] | None = None,
) -> Path:
    """A base of random weights, large enough that its answers differ.

    Args:
        folder: where it is written.
        tokenizer: None for one whose tokens are bytes.
        config: of the architecture; None for a small Llama.
        generation: what its generation_config.json says besides.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = tokenizer or byte_tokenizer()
    torch.manual_seed(11)
    if config is None:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            **special_ids(tokenizer),
        )
    made: Any = AutoModelForCausalLM
    model = made.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.25)
    for name, value in (generation or {}).items():
        setattr(model.generation_config, name, value)
    return write_base(folder, model, tokenizer)


def special_ids(tokenizer: Any) -> dict[str, Any]:
    """The ids that a config.json names, as the tokenizer has them."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def base_that_says(
    folder: Path,
    tokenizer: Any,
    sequences: Iterable[Sequence[int]],
    generation: Mapping[str, Any] | None = None,
) -> Path:
    """A base in which the last token alone decides on the next one, almost surely.

    Args:
        folder: where it is written.
        tokenizer: its tokenizer.
        sequences: token ids, each of which is followed by the next.
        generation: what its generation_config.json says besides.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    follows: dict[int, int] = {}
    for sequence in sequences:
        for one, other in zip(sequence, sequence[1:], strict=False):
            assert follows.setdefault(one, other) == other, "one token has one that follows"
    size = 4 * math.ceil(len(tokenizer) / 4)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            **special_ids(tokenizer),
        )
    )
    torch.manual_seed(12)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.004)
        model.model.embed_tokens.weight.copy_(torch.eye(size)[: len(tokenizer)])
        model.lm_head.weight.zero_()
        for one, other in follows.items():
            model.lm_head.weight[other, one] = 40 / math.sqrt(size)
    for name, value in (generation or {}).items():
        setattr(model.generation_config, name, value)
    return write_base(folder, model.float(), tokenizer)


def watering(client: str, count: int = 12, **more: Any) -> list[dict[str, Any]]:
    """Rows of a client, no two of them alike, and none like another client's."""
    return [
        {
            "instruction": "Say when to water.",
            "input": f"pot {place} of {client}",
            "output": ("today", "tomorrow", "never")[place % 3],
            **more,
        }
        for place in range(count)
    ]


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Rows as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_clients(folder: Path, rows: Mapping[str, Iterable[Mapping[str, Any]]]) -> Path:
    """FOLDER/<client>.jsonl for each client."""
    for client, own in rows.items():
        write_lines(folder / f"{client}.jsonl", own)
    return folder


def options(base: Path | str, rows: Path | str, **more: object) -> list[str]:
    """Settings as the command line takes them; `data__prompt` stands for data.prompt."""
    given = {name.replace("__", "."): value for name, value in more.items()}
    settings = {**BED, "model.base": base, "data.path": rows, **given}
    return [
        part
        for name, value in settings.items()
        for part in (
            "--set",
            f"{name}={value if isinstance(value, str | Path) else json.dumps(value)}",
        )
    ]


def call(*arguments: str | Path) -> Ended:
    """The command in this process; warnings go to its stderr, as they do for a user."""
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        return call_main(*arguments)
    finally:
        root.handlers = handlers


def check(base: Path | str, rows: Path | str, **more: object) -> dict[str, Any]:
    """What `fedmira check --format json` prints."""
    ended = call("check", *options(base, rows, **more), "--format", "json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert isinstance(document, dict)
    return document


def run(output: Path, base: Path | str, rows: Path | str, **more: object) -> Ended:
    """`fedmira run` into a new folder, which has to finish."""
    ended = call("run", *options(base, rows, **more), "--output", output)
    assert ended.code == 0, ended.err
    assert run_json(output)["status"] == "finished"
    return ended


def run_json(folder: Path) -> dict[str, Any]:
    """What a run says of itself."""
    document = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def refused(ended: Ended, *words: str) -> str:
    """Asserts that a command ended with exit code 2 and errors of one line each; gives them.

    Args:
        ended: how the command ended.
        words: what has to stand in its errors.
    """
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert ended.code == 2 and errors, ended.err
    assert ended.err.splitlines()[-1] == errors[-1], "nothing stands behind the errors"
    said = "\n".join(errors)
    assert [word for word in words if word not in said] == [], said
    return said


def noted(document: Mapping[str, Any], *words: str) -> str:
    """The one note of a run or a check that holds all these words."""
    found = [note for note in document.get("notes", ()) if all(word in note for word in words)]
    assert len(found) == 1, document.get("notes")
    return str(found[0])


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **more: Any) -> list[int]:
    """What transformers itself makes of a conversation."""
    found = tokenizer.apply_chat_template(
        [dict(message) for message in messages], tokenize=True, return_dict=False, **more
    )
    return [int(token) for token in found]


def card_says(folder: Path, client: str, base: Path, request: str) -> str:
    """What the code of an adapter's card prints for a request, filled in as it asks to be."""
    place = folder / "adapters" / client
    (code,) = re.findall(r"```python\n(.*?)```", (place / "README.md").read_text(), re.DOTALL)
    filled = {"THIS FOLDER": str(place), "FOLDER OR HUB ID OF THE BASE": str(base)}
    if '.format(instruction="{instruction}"' in code:
        instruction, _, text = request.partition("\n\n")
        head, called, tail = code.rpartition(".format(")
        tail = tail.replace("{instruction}", instruction).replace("{input}", text)
        code = head + called + tail
    else:
        filled["{instruction}\\n\\n{input}"] = json.dumps(request)[1:-1]
    for blank, value in filled.items():
        assert code.count(blank) == 1, blank
        code = code.replace(blank, value)
    out = StringIO()
    with redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    return out.getvalue()


def split_answer(tokenizer: Any, ids: Sequence[int], answer: str) -> tuple[str, str]:
    """The text of token ids up to the last place of an answer, and from there on."""
    text = str(tokenizer.decode(list(ids)))
    place = text.rindex(answer)
    return text[:place], text[place:]


@dataclass
class Reads:
    """What the commands of a test have read, as the model is given it."""

    datasets: list[Dataset] = field(default_factory=list)

    @property
    def clients(self) -> dict[str, ClientData]:
        """The clients of the last command."""
        return {client.client_id: client for client in self.datasets[-1].clients}

    def rows(self, client: str, *parts: str) -> list[EncodedExample]:
        """The rows of a client, of all parts or of some."""
        own = self.clients[client]
        return [
            row for part in parts or ("train", "validation", "test") for row in getattr(own, part)
        ]

    def prompts(self, tokenizer: Any, client: str, *parts: str) -> list[str]:
        """The prompts of a client as text."""
        return [str(tokenizer.decode(list(row.prompt))) for row in self.rows(client, *parts)]

    def answers(self, tokenizer: Any, client: str, *parts: str) -> list[str]:
        """The responses of a client as text."""
        return [str(tokenizer.decode(list(row.response))) for row in self.rows(client, *parts)]


@dataclass
class Asked:
    """The prompts that adapters were asked with, and what they answered."""

    prompts: list[tuple[int, ...]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
