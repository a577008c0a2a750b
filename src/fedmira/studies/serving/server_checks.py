"""Files for servers, parsed as their readers parse them."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from fedmira.errors import RunError
from fedmira.studies.serving.server_files import LORA_RANKS

__all__ = ["filled", "problems_of_llama", "problems_of_vllm", "read_modelfile"]

_OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")
_FIELD = re.compile(r"\{\{ \.(System|Prompt) \}\}")
_QUOTES = '"""'


class _Arguments(argparse.ArgumentParser):
    """Raises where an argument is wrong, in place of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise RunError(message)


def _words(script: Path) -> list[str]:
    """The words of a shell script; a line that ends with a backslash goes on."""
    text = script.read_text(encoding="utf-8").replace("\\\n", " ")
    return shlex.split(text, comments=True)


def problems_of_vllm(folder: Path, script: str) -> list[str]:
    """What vLLM would refuse of its command and of the adapters that it names.

    Its rules, by its documentation and source: --lora-modules are JSON objects of name, path and
    base_model_name; --max-lora-rank is one of a list, and no adapter is above it; adapter_config
    .json has r, lora_alpha and target_modules, no modules_to_save, no DoRA and no bias; the
    resolver takes a folder only where peft_type is LORA and base_model_name_or_path the name of
    the served base.

    Args:
        folder: of all files.
        script: the file with the command, relative to it.
    """
    words = _words(folder / script)
    start = words.index("vllm")
    parser = _Arguments(prog="vllm serve", allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--enable-lora", action="store_true", required=True)
    parser.add_argument("--max-lora-rank", type=int, choices=LORA_RANKS, default=16)
    parser.add_argument("--max-loras", type=int, default=1)
    parser.add_argument("--max-cpu-loras", type=int)
    parser.add_argument("--generation-config")
    parser.add_argument("--chat-template")
    parser.add_argument("--chat-template-content-format", choices=("auto", "string", "openai"))
    parser.add_argument("--lora-modules", nargs="+", type=json.loads)
    found = parser.parse_args(words[start + 2 :])
    problems = []
    if found.max_cpu_loras < found.max_loras:
        problems.append("--max-cpu-loras is below --max-loras")
    if found.chat_template and not (folder / found.chat_template).is_file():
        problems.append(f"--chat-template: there is no {found.chat_template}")
    named = found.lora_modules
    if named is None:  # the resolver finds them by the names of folders
        names = [place.name for place in sorted((folder / "adapters").iterdir())]
        named = [{"name": name, "path": f"adapters/{name}"} for name in names]
    for module in named:
        unknown = set(module) - {"name", "path", "base_model_name"}
        if unknown or module.get("base_model_name", found.model) != found.model:
            problems.append(f"--lora-modules: {module} names another base, or other keys")
        config = folder / module["path"] / "adapter_config.json"
        problems += _problems_of_adapter(config, found.model, found.max_lora_rank)
    return problems


def _problems_of_adapter(path: Path, base: str, largest: int) -> list[str]:
    """What vLLM and its resolver would refuse of one adapter."""
    config: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    wanted = {"peft_type": "LORA", "base_model_name_or_path": base, "bias": "none"}
    problems = [
        f"{path}: {key} is {config.get(key)!r}, not {value!r}"
        for key, value in wanted.items()
        if config.get(key) != value
    ]
    missing = [key for key in ("r", "lora_alpha", "target_modules") if not config.get(key)]
    refused = [key for key in ("modules_to_save", "use_dora", "lora_bias") if config.get(key)]
    if missing or refused:
        problems.append(f"{path}: lacks {missing} or has {refused}")
    if int(config.get("r", 0)) > largest:
        problems.append(f"{path}: r is {config['r']}, above --max-lora-rank {largest}")
    if not (path.parent / "adapter_model.safetensors").is_file():
        problems.append(f"{path.parent}: there is no adapter_model.safetensors")
    return problems


def problems_of_llama(folder: Path) -> list[str]:
    """What llama.cpp's scripts and its server would refuse of their commands.

    Args:
        folder: of all files.
    """
    made, problems = {"llama_cpp/base.gguf"}, []
    text = (folder / "llama_cpp" / "convert.sh").read_text(encoding="utf-8")
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["python"] or not words[1].endswith("convert_lora_to_gguf.py"):
            continue
        parser = _Arguments(prog="convert_lora_to_gguf.py", allow_abbrev=False)
        parser.add_argument("--base", type=Path)
        parser.add_argument("--outtype", choices=_OUTTYPES)
        parser.add_argument("--outfile")
        parser.add_argument("lora_path", type=Path)
        found = parser.parse_args(words[2:])
        made.add(found.outfile)
        config = json.loads((folder / found.lora_path / "adapter_config.json").read_text("utf-8"))
        if config.get("use_rslora") or config.get("fan_in_fan_out"):
            problems.append(f"{found.lora_path}: llama.cpp would scale or turn it otherwise")
    words = _words(folder / "llama_cpp" / "serve.sh")
    parser = _Arguments(prog="llama-server", allow_abbrev=False)
    parser.add_argument("-m", required=True)
    parser.add_argument("--lora", action="append")
    parser.add_argument("--lora-init-without-apply", action="store_true")
    parser.add_argument("--jinja", action="store_true")
    parser.add_argument("--chat-template-file")
    found = parser.parse_args(words[words.index("llama-server") + 1 :])
    absent = [name for name in (found.m, *found.lora) if name not in made]
    problems += [f"llama-server: convert.sh makes no {name}" for name in absent]
    return problems


def read_modelfile(text: str) -> dict[str, list[str]]:
    """Instruction -> its values, as Ollama reads a Modelfile.

    Args:
        text: of the file.

    Raises:
        RunError: a line is no instruction, or a quoted value does not end.
    """
    found: dict[str, list[str]] = {}
    while text:
        line, _, rest = text.partition("\n")
        if not line.strip() or line.startswith("#"):
            text = rest
            continue
        name, _, value = line.partition(" ")
        if not re.fullmatch(r"FROM|ADAPTER|TEMPLATE|SYSTEM|PARAMETER", name):
            raise RunError(f"{name!r} is no instruction of a Modelfile")
        if value.startswith(_QUOTES):
            body, closed, rest = text[len(name) + 1 + len(_QUOTES) :].partition(_QUOTES)
            if not closed:
                raise RunError(f"{name}: a quoted value does not end")
            value, rest = body, rest.removeprefix("\n")
        found.setdefault(name, []).append(value)
        text = rest
    return found


def filled(template: str, system: str, prompt: str) -> str:
    """What a TEMPLATE of plain fields makes of a request.

    Args:
        template: of the Modelfile.
        system: for .System.
        prompt: for .Prompt.
    """
    fields: Mapping[str, str] = {"System": system, "Prompt": prompt}
    return _FIELD.sub(lambda found: fields[found[1]], template)
