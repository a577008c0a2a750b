"""The texts of what servers read: vLLM's command, Ollama's Modelfile, llama.cpp's commands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmira.data import PROMPTS, Encoder, Example, Tokenizer, asked
from fedmira.errors import ConfigError

__all__ = [
    "LORA_RANKS",
    "ServedClient",
    "bare_prompt",
    "convert_script",
    "llama_script",
    "modelfile",
    "ollama_texts",
    "resolver_script",
    "vllm_script",
]

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank; newer releases take 1 as well."""

_AT_ONCE = 8
_SYSTEM, _PROMPT = "Zqsystemq", "Zqpromptq"
"""Stand for instruction and input while the texts around them are found."""


@dataclass(frozen=True, slots=True)
class ServedClient:
    """A client as servers know it.

    Attributes:
        name: its id, which is the name of its model and of its folder in adapters/.
        rank: of its adapter.
        shared: what the prompts of its rows share.
        messages: a request with the text "{input}".
        template: the file with its chat template, "" where there is none.
        why_not: why there is none.
    """

    name: str
    rank: int
    shared: Mapping[str, Any]
    messages: list[dict[str, Any]]
    template: str
    why_not: str = ""


def vllm_script(base: str, clients: Sequence[ServedClient], template: str) -> str:
    """vllm/serve.sh: every adapter is named.

    Args:
        base: what the server shall call the base, and load.
        clients: in order.
        template: the file of the chat template, "" for none.

    Raises:
        ConfigError: a rank is larger than vLLM takes.
    """
    named = [
        json.dumps(
            {
                "name": client.name,
                "path": f"adapters/{client.name}",
                "base_model_name": base,
            },
            ensure_ascii=False,
        )
        for client in clients
    ]
    lines = [*_vllm_lines(base, clients, template), "--lora-modules"]
    return _VLLM + _command([*lines, *named])


def resolver_script(base: str, clients: Sequence[ServedClient], template: str) -> str:
    """vllm/serve_resolver.sh: adapters are found in a folder when they are first asked for.

    Args:
        base: as for `vllm_script`.
        clients: as for `vllm_script`.
        template: as for `vllm_script`.

    Raises:
        ConfigError: a rank is larger than vLLM takes.
    """
    return _RESOLVER + _command(_vllm_lines(base, clients, template))


def _vllm_lines(base: str, clients: Sequence[ServedClient], template: str) -> list[str]:
    largest = max(client.rank for client in clients)
    rank = next((allowed for allowed in LORA_RANKS if allowed >= largest), None)
    if rank is None:
        raise ConfigError(
            f"serve-config: the largest rank is {largest}, and vLLM serves at most "
            f"{LORA_RANKS[-1]}; export such clients with --merged"
        )
    at_once = min(len(clients), _AT_ONCE)
    chat = [f"--chat-template {shlex.quote(template)}", "--chat-template-content-format string"]
    return [
        f"exec vllm serve {shlex.quote(base)}",
        "--enable-lora",
        f"--max-lora-rank {rank}",
        f"--max-loras {at_once}",
        f"--max-cpu-loras {len(clients)}",
        "--generation-config vllm",
        *(chat if template else []),
    ]


def _command(parts: Sequence[str]) -> str:
    plain = [part if part.startswith(("exec", "--")) else shlex.quote(part) for part in parts]
    return " \\\n  ".join(plain) + "\n"


def convert_script(base: str, clients: Sequence[ServedClient]) -> str:
    """llama_cpp/convert.sh: base and adapters as GGUF.

    Args:
        base: what the base is called; a folder is taken as it is.
        clients: in order.
    """
    there = Path(base).is_absolute()
    place = f"BASE=${{BASE:-{shlex.quote(base)}}}" if there else _BASE_NEEDED
    lines = [
        f'python "$LLAMA_CPP/convert_lora_to_gguf.py" --base "$BASE" --outtype f32 '
        f"--outfile {shlex.quote(f'llama_cpp/{client.name}.gguf')} "
        f"{shlex.quote(f'adapters/{client.name}')}"
        for client in clients
    ]
    return _CONVERT.format(base=place) + "\n".join(lines) + "\n"


def llama_script(clients: Sequence[ServedClient], template: str) -> str:
    """llama_cpp/serve.sh: one server, adapters chosen by each request.

    Args:
        clients: in the order that gives each adapter its number.
        template: the file of the chat template, "" for none.
    """
    numbers = "\n".join(f"#   {place}: {client.name}" for place, client in enumerate(clients))
    chat = ["--jinja", f"--chat-template-file {shlex.quote(template)}"] if template else []
    parts = [
        "exec llama-server -m llama_cpp/base.gguf",
        "--lora-init-without-apply",
        *chat,
        *(f"--lora {shlex.quote(f'llama_cpp/{client.name}.gguf')}" for client in clients),
    ]
    return _LLAMA.format(numbers=numbers) + _command(parts)


def bare_prompt(form: str, tokenizer: Tokenizer, encoder: Encoder, example: Example) -> str:
    """The text of a prompt without the start of sequence, which a GGUF reader adds itself.

    Args:
        form: a key of `PROMPTS`.
        tokenizer: that of the base.
        encoder: of the run's settings.
        example: a row; its response does not matter.
    """
    if encoder.template is None:
        return PROMPTS[form](example, tokenizer)
    text = encoder.template.prompt(example)
    start = getattr(tokenizer, "bos_token", None)
    return text.removeprefix(start) if start else text


def ollama_texts(
    form: str, tokenizer: Tokenizer, encoder: Encoder, shared: Mapping[str, Any]
) -> tuple[str, str] | None:
    """TEMPLATE and SYSTEM that ask as in training, or None where Ollama's fields cannot.

    Args:
        form: a key of `PROMPTS`.
        tokenizer: that of the base.
        encoder: of the run's settings.
        shared: what the prompts of a client's rows share.
    """
    key = "system" if shared.get("conversation") else "instruction"
    system = str(shared.get(key, ""))
    marked = dict(shared) | ({key: _SYSTEM} if system else {})
    text = bare_prompt(form, tokenizer, encoder, asked(marked, _PROMPT))
    counts = (text.count(_SYSTEM), text.count(_PROMPT))
    if counts != (1 if system else 0, 1) or "{{" in text or '"""' in text + system:
        return None
    return text.replace(_SYSTEM, "{{ .System }}").replace(_PROMPT, "{{ .Prompt }}"), system


def modelfile(
    client: ServedClient,
    texts: tuple[str, str],
    *,
    context: int,
    max_new_tokens: int,
    stops: Sequence[str],
) -> str:
    """ollama/<client>.Modelfile: one model with one adapter.

    Args:
        client: whose.
        texts: what `ollama_texts` gave.
        context: positions of the context.
        max_new_tokens: longest answer.
        stops: texts that end an answer.
    """
    template, system = texts
    lines = [
        _OLLAMA.format(file=_safe(client.name)),
        "FROM ../llama_cpp/base.gguf",
        f"ADAPTER ../llama_cpp/{client.name}.gguf",
        f'TEMPLATE """{template}"""',
        *([f'SYSTEM """{system}"""'] if system else []),
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        f"PARAMETER num_ctx {context}",
        f"PARAMETER num_predict {max_new_tokens}",
        *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops),
    ]
    return "\n".join(lines) + "\n"


def _safe(name: str) -> str:
    """A name as Ollama takes it."""
    return re.sub(r"[^a-z0-9._-]", "-", name.lower())


_VLLM = """\
#!/bin/sh
# One base and all adapters behind vLLM's OpenAI server; a request names its client as "model".
# Its arguments and files were parsed when they were written; vLLM itself has not been run on them.
# The base must be the one of the run: clients.json has its sha256.
cd "$(dirname "$0")/.." || exit 1
"""

_RESOLVER = """\
#!/bin/sh
# The same for many adapters: vLLM looks into adapters/ when a request names one that it does not
# know. It takes a folder only where base_model_name_or_path in its adapter_config.json is the name
# of the served base, letter by letter: leave --served-model-name away.
# Its arguments and files were parsed when they were written; vLLM itself has not been run on them.
# Whoever reaches this server can have adapters loaded: keep it inside.
cd "$(dirname "$0")/.." || exit 1
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=true
export VLLM_PLUGINS=lora_filesystem_resolver
export VLLM_LORA_RESOLVER_CACHE_DIR="$PWD/adapters"
"""

_BASE_NEEDED = "BASE=${BASE:?set BASE to a local folder of the base}"

_CONVERT = """\
#!/bin/sh
# Base and adapters as GGUF, by the scripts of a llama.cpp checkout: LLAMA_CPP=PATH sh convert.sh
# The arguments were parsed as those scripts do; they have not been run here.
set -e
LLAMA_CPP=${{LLAMA_CPP:?set LLAMA_CPP to the folder of a llama.cpp checkout}}
{base}
cd "$(dirname "$0")/.."
python "$LLAMA_CPP/convert_hf_to_gguf.py" --outtype auto --outfile llama_cpp/base.gguf "$BASE"
"""

_LLAMA = """\
#!/bin/sh
# One base and all adapters behind llama-server, after convert.sh. A request chooses its adapter by
# number: "lora": [{{"id": 0, "scale": 1.0}}]; those that it does not name are off.
{numbers}
# llama-server has not been run on this here.
cd "$(dirname "$0")/.." || exit 1
"""

_OLLAMA = """\
# After llama_cpp/convert.sh: ollama create {file} -f THIS FILE
# TEMPLATE is one request as in training; a conversation of several turns was not trained.
# The texts were held against the prompts of training; Ollama has not been run on them."""
