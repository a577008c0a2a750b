"""README.md and the program for PEFT in a folder for servers."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from fedmira.studies.serving.server_files import ServedClient

__all__ = ["LOAD", "page"]

_SHOWN = 20


def page(
    base: str,
    clients: Sequence[ServedClient],
    template: str,
    ends: Sequence[int],
    notes: Sequence[str],
    adapters_alone: bool,
) -> str:
    """README.md: what each file is, how to ask, and what was tried.

    Args:
        base: what servers call the base.
        clients: in order.
        template: the file of the chat template, "" for none.
        ends: tokens that end an answer.
        notes: what is to be said, a sentence each.
        adapters_alone: whether there are no files for vLLM, llama.cpp and Ollama.
    """
    first = clients[0]
    body = {
        "model": first.name,
        "messages": first.messages,
        "temperature": 0,
        "stop_token_ids": list(ends),
    }
    names = ", ".join(client.name for client in clients[:_SHOWN])
    more = f" and {len(clients) - _SHOWN} more" if len(clients) > _SHOWN else ""
    listed = "\n".join(f"- {note}" for note in notes) or "- Nothing."
    chat = _CHAT.format(template=template) if template else ""
    parts = [
        f"# Adapters of {len(clients)} clients, for servers\n\nBase: `{base}`. "
        f"Clients: {names}{more}.\n",
        _FILES if not adapters_alone else _PEFT_ALONE,
        chat,
        _ASK.format(body=shlex.quote(json.dumps(body, ensure_ascii=False)))
        if not adapters_alone
        else "",
        f"## What is left out, or not as in training\n\n{listed}\n",
        _TRIED,
    ]
    return "\n".join(part for part in parts if part)


_FILES = """\
| file | for |
|---|---|
| `adapters/<client>/` | PEFT folders, whose `base_model_name_or_path` is the base above |
| `clients.json` | each client's messages, tokens that end an answer, the base's sha256 |
| `vllm/serve.sh` | vLLM with every adapter named |
| `vllm/serve_resolver.sh` | vLLM that finds adapters in `adapters/` when they are first asked for |
| `llama_cpp/convert.sh`, `serve.sh` | GGUF files by llama.cpp's scripts, and its server |
| `ollama/<client>.Modelfile` | one Ollama model a client, on those GGUF files |
| `transformers/load.py` | all adapters on one base, with transformers and PEFT |
"""

_PEFT_ALONE = """\
| file | for |
|---|---|
| `adapters/<client>/` | PEFT folders |
| `clients.json` | each client's messages, tokens that end an answer, the base's sha256 |
| `transformers/load.py` | all adapters on one base, with transformers and PEFT |
"""

_CHAT = """\
`{template}` writes the prompt of training, token by token: it was held against it on rows of every
client. It writes the start of sequence itself where training had one, so add no other. Send the
messages as `clients.json` has them, with the text in place of `{{input}}`. Where the run's prompt
form is alpaca or plain, a client whose rows are single requests takes the instruction as a system
message and one user message; the template refuses a history, which was not trained.
"""

_ASK = """\
A request to vLLM; to llama-server, add `"lora": [{{"id": NUMBER, "scale": 1.0}}]`. Training and the
run's figures are greedy, so the temperature is 0:

    curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d {body}
"""

_TRIED = """\
## What was tried

When this folder was written, its commands were parsed by argument parsers with the options of
vLLM's, llama.cpp's and llama-server's documentation, its adapters held against the rules of vLLM's
loader and resolver, each Modelfile read back and its TEMPLATE filled with rows of the client and
held against the prompts of training, and the chat template rendered by transformers. `load.py` was
compiled. vLLM, llama.cpp and Ollama were not run: their releases may name options otherwise. A
server that computes in half precision, or on a base that it quantises, answers otherwise here and
there than the run did.
"""

LOAD = '''\
"""All adapters on one base, with transformers and PEFT: python load.py CLIENT TEXT"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

FOLDER = Path(__file__).resolve().parent.parent
ABOUT = json.loads((FOLDER / "clients.json").read_text(encoding="utf-8"))
NAMES = {client: f"client_{place}" for place, client in enumerate(ABOUT["clients"])}


def load(base=ABOUT["base"]):
    """The base with every adapter, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=ABOUT["dtype"])
    model.generation_config = GenerationConfig()  # the base's own penalties do not act
    wrapped = None
    for client, name in NAMES.items():
        place = str(FOLDER / ABOUT["clients"][client]["adapter"])
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(model, place, adapter_name=name)
        else:
            wrapped.load_adapter(place, adapter_name=name)
    return wrapped.eval(), tokenizer


def ask(model, tokenizer, client, text):
    """What a client's adapter answers."""
    about = ABOUT["clients"][client]
    if about["chat_template"] is None:
        sys.exit(f"{client} has no chat template that asks as in training; README.md says why")
    messages = [
        {**message, "content": message["content"].replace("{input}", text)}
        for message in about["messages"]
    ]
    template = (FOLDER / about["chat_template"]).read_text(encoding="utf-8")
    prompt = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
    model.set_adapter(NAMES[client])
    answer = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=ABOUT["max_new_tokens"],
        do_sample=False,
        eos_token_id=ABOUT["stop_token_ids"],
        pad_token_id=ABOUT["stop_token_ids"][0],
    )
    return tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in NAMES:
        sys.exit(f"python load.py CLIENT TEXT; clients are {', '.join(NAMES)}")
    print(ask(*load(), *sys.argv[1:]))
'''
