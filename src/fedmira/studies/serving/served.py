"""A folder with what servers need to offer the adapters of a run, each file parsed once written."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmira.data import Example, ObjectRows, make_encoder
from fedmira.errors import ConfigError, RunError
from fedmira.messages import ClientId
from fedmira.model import LoraKind, end_tokens
from fedmira.records import new_folder
from fedmira.runs import RunFolder
from fedmira.studies.saved import SavedAdapters, refuse_unknown
from fedmira.studies.serving.request_forms import FewRows, few_rows, request_form
from fedmira.studies.serving.server_checks import (
    filled,
    problems_of_llama,
    problems_of_vllm,
    read_modelfile,
)
from fedmira.studies.serving.server_files import (
    ServedClient,
    bare_prompt,
    convert_script,
    llama_script,
    modelfile,
    ollama_texts,
    resolver_script,
    vllm_script,
)
from fedmira.studies.serving.server_pages import LOAD, page

__all__ = ["Served", "write_served"]

_TEMPLATES = {False: "chat_template.jinja", True: "chat_template.conversations.jinja"}
"""Of clients whose rows are requests, and of those whose rows are conversations."""


@dataclass(frozen=True, slots=True)
class Served:
    """What was written for servers.

    Attributes:
        folder: where it lies.
        files: their names, sorted.
        notes: what was left out or is not as in training, a sentence each.
    """

    folder: Path
    files: tuple[str, ...]
    notes: tuple[str, ...]


def write_served(
    saved: SavedAdapters,
    output: Path,
    *,
    clients: Sequence[ClientId] = (),
    base: str = "",
    rows: ObjectRows | None = None,
) -> Served:
    """Writes adapters, chat template and commands for vLLM, llama.cpp, Ollama and PEFT.

    Args:
        saved: what the run has saved.
        output: a new folder.
        clients: whose adapters; none for all.
        base: the folder or hub id under which the servers find the base; "" for where it lies here.
        rows: of a run whose rows were objects.

    Raises:
        ConfigError: adapters of this kind are served by nobody, or there is no such client.
        RunFolderError: something is at `output` already.
        RunError: a file is not what its reader takes; none is left.
    """
    if not isinstance(saved.kind, LoraKind):
        raise ConfigError(
            f"serve-config: adapters of kind {saved.config.adapter.kind!r} are read by plain PEFT "
            "alone, and by none of these servers; use fedmira export"
        )
    for client in clients:
        refuse_unknown(saved, client)
    few = few_rows(saved, list(clients) or list(saved.adapters), rows)
    with new_folder(output) as folder:
        writer = _Writer(saved, saved.kind, folder, base or saved.kind.base.known_as, few)
        notes = writer.write()
        files = sorted(
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        )
    return Served(output, tuple(files), tuple(notes))


class _Writer:
    """Writes one folder, and parses what it wrote.

    Args:
        saved: what the run has saved.
        kind: its adapters.
        folder: exists, and is empty.
        base: what servers call the base.
        few: rows of each client.
    """

    def __init__(
        self,
        saved: SavedAdapters,
        kind: LoraKind,
        folder: Path,
        base: str,
        few: Mapping[ClientId, FewRows],
    ) -> None:
        self._saved, self._kind, self._folder, self._base = saved, kind, folder, base
        self._few = few
        self._tokenizer = kind.base.tokenizer
        self._encoder = make_encoder(saved.config.data, self._tokenizer)
        self._notes: list[str] = []

    def write(self) -> list[str]:
        """All files; what is to be said of them."""
        if not self._base:
            raise ConfigError(
                "serve-config: the base of this run was an object without a name; give --base, "
                "the folder or hub id under which the servers find it"
            )
        turned = any(target.stored_transposed for target in self._kind.targets)
        clients = [self._client(client) for client in self._few]
        usual = Counter(client.template for client in clients).most_common(1)[0][0]
        for client in clients:
            if client.template != usual or not client.template:
                own = f"its requests have a template of their own, {client.template}"
                self._notes.append(f"{client.name}: {client.why_not or own}")
        if turned:
            self._notes.append(
                "vLLM, llama.cpp and Ollama are left out: they offer no adapters on layers that "
                "are stored as GPT-2's are (Conv1D); export each client with --merged"
            )
        else:
            self._vllm(clients, usual)
            self._llama(clients, usual)
        self._put("transformers/load.py", LOAD)
        compile(LOAD, "load.py", "exec")
        self._put("clients.json", json.dumps(self._about(clients, usual), indent=1) + "\n")
        if not all(few.real for few in self._few.values()):
            self._notes.append(
                "rows of clients are not on this machine, so templates were held against the "
                "prompts of made-up requests"
            )
        self._put("README.md", page(self._base, clients, usual, self._ends, self._notes, turned))
        return self._notes

    def _client(self, client: ClientId) -> ServedClient:
        """A client's adapter and chat template."""
        folder = RunFolder(self._saved.path)
        folder.check_adapter(client)
        source = folder.adapters / client
        place = self._folder / "adapters" / client
        place.mkdir(parents=True)
        shutil.copy(source / "adapter_model.safetensors", place)
        config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = self._base
        if config.get("use_rslora"):  # llama.cpp knows alpha / r alone
            config |= {
                "use_rslora": False,
                "lora_alpha": config["lora_alpha"] * math.sqrt(config["r"]),
            }
        text = json.dumps(config, indent=2, sort_keys=True)
        self._put(f"adapters/{client}/adapter_config.json", text)
        form = request_form(self._saved, client, self._few[client], own_instruction=False)
        name = _TEMPLATES[bool(form.shared.get("conversation"))] if form.template else ""
        if name:
            self._put(name, form.template)
        return ServedClient(
            client, int(config["r"]), form.shared, form.messages, name, form.why_not
        )

    def _vllm(self, clients: Sequence[ServedClient], template: str) -> None:
        for name, script in (
            ("vllm/serve.sh", vllm_script(self._base, clients, template)),
            ("vllm/serve_resolver.sh", resolver_script(self._base, clients, template)),
        ):
            self._put(name, script)
            self._refuse(name, problems_of_vllm(self._folder, name))

    def _llama(self, clients: Sequence[ServedClient], template: str) -> None:
        self._put("llama_cpp/convert.sh", convert_script(self._base, clients))
        self._put("llama_cpp/serve.sh", llama_script(clients, template))
        self._refuse("llama_cpp/", problems_of_llama(self._folder))
        form, config = self._saved.config.data.prompt, self._saved.config
        for client in clients:
            texts = ollama_texts(form, self._tokenizer, self._encoder, client.shared)
            if texts is None:
                self._notes.append(
                    f"{client.name}: no Modelfile, as its prompt cannot be written with Ollama's "
                    "fields .System and .Prompt"
                )
                continue
            longest = config.data.max_length + config.evaluation.max_new_tokens
            text = modelfile(
                client,
                texts,
                context=min(longest, self._kind.base.max_positions or longest),
                max_new_tokens=config.evaluation.max_new_tokens,
                stops=[str(self._tokenizer.decode([token])) for token in self._ends],
            )
            self._put(f"ollama/{client.name}.Modelfile", text)
            self._refuse(f"ollama/{client.name}.Modelfile", self._wrong_prompts(client, text))

    def _wrong_prompts(self, client: ServedClient, text: str) -> list[str]:
        """What a Modelfile asks otherwise than training did, of the client's own rows."""
        found = read_modelfile(text)
        (template,), system = found["TEMPLATE"], found.get("SYSTEM", [""])[0]
        problems = []
        for example in self._few[client.name].examples:
            prompt = _only_prompt(example, system)
            if prompt is None:
                continue
            wanted = bare_prompt(
                self._saved.config.data.prompt, self._tokenizer, self._encoder, example
            )
            if filled(template, system, prompt) != wanted:
                problems.append(f"TEMPLATE asks otherwise than training: {wanted[:60]!r}")
        return problems

    @property
    def _ends(self) -> list[int]:
        return end_tokens(self._kind.base)

    def _about(self, clients: Sequence[ServedClient], template: str) -> dict[str, object]:
        config = self._saved.config
        return {
            "base": self._base,
            "base_sha256": self._kind.base.sha256,
            "dtype": str(self._kind.base.dtype).removeprefix("torch."),
            "chat_template": template or None,
            "max_new_tokens": config.evaluation.max_new_tokens,
            "stop_token_ids": self._ends,
            "clients": {
                client.name: {
                    "adapter": f"adapters/{client.name}",
                    "rank": client.rank,
                    "chat_template": client.template or None,
                    "messages": client.messages,
                }
                for client in clients
            },
        }

    def _put(self, name: str, text: str) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")

    def _refuse(self, name: str, problems: Sequence[str]) -> None:
        if problems:
            raise RunError(
                f"{name}: parsed as its reader does, it is wrong ({'; '.join(problems[:3])}); "
                "nothing was written: report this run's adapters and names"
            )


def _only_prompt(example: Example, system: str) -> str | None:
    """The text of .Prompt for a row, or None where the row does not have the form of the fields."""
    if not example.messages:
        if example.instruction == system and system:
            return example.input or None
        return None if example.input else example.instruction
    before = [("system", system)] if system else []
    *first, (role, text) = example.messages
    return text if first == before and role == "user" else None
