"""A client's adapter as a folder of its own: for plain PEFT, or merged with its base."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fedmira.adapters import Adapter
from fedmira.data import ObjectRows
from fedmira.errors import ConfigError, RunError
from fedmira.messages import ClientId
from fedmira.model import FoldProof, LoraKind, adapter_logits, held_against, write_folded
from fedmira.records import new_folder
from fedmira.runs import RunFolder
from fedmira.studies.saved import SavedAdapters, refuse_unknown
from fedmira.studies.serving.request_forms import FewRows, RequestForm, few_rows, request_form

__all__ = ["DTYPES", "Exported", "export_adapter"]

DTYPES = ("float32", "bfloat16", "float16")
"""Number types of exported weights."""

_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and what was found when it was read back.

    Attributes:
        folder: where it lies.
        client: whose adapter it is.
        merged: whether it is a whole model.
        dtype: number type of the weights.
        proof: logits of what was written, held against those of base and adapter.
        real_rows: whether these were rows of the client, or requests that were made up.
        chat_template: whether the folder has a chat template that asks as in training.
        why_not: why it has none.
    """

    folder: Path
    client: ClientId
    merged: bool
    dtype: str
    proof: FoldProof
    real_rows: bool
    chat_template: bool
    why_not: str = ""

    @property
    def about(self) -> dict[str, Any]:
        """The same as JSON."""
        return {**asdict(self), "folder": str(self.folder)}

    def lines(self) -> list[str]:
        """What is to be told, a sentence each."""
        proof, kind = self.proof, "rows of the client" if self.real_rows else "made-up requests"
        told = [
            f"{'merged model' if self.merged else 'PEFT adapter'} of {self.client!r} in "
            f"{self.dtype}: {self.folder}",
            f"read back and held against base and adapter on {proof.rows} {kind}, "
            f"{proof.positions} positions: largest difference of a logit {proof.largest:.2g}, of "
            f"logits up to {proof.logit:.3g}; the adapter itself changes logits by up to "
            f"{proof.effect:.3g}",
        ]
        if self.dtype != "float32":
            told.append(
                f"before the rounding to {self.dtype} the largest difference was {proof.exact:.2g}"
            )
        if proof.largest > proof.effect / 10 and proof.effect > 0:
            told.append(
                "rounding changes logits by more than a tenth of what the adapter does: prefer "
                "--dtype float32, or serve base and adapter apart"
            )
        if not self.real_rows:
            told.append("no row of the client is on this machine, so made-up requests were read")
        told.append(
            "the chat template writes the prompt of training, token by token"
            if self.chat_template
            else f"there is no chat template that asks as in training: {self.why_not}"
        )
        return told


def export_adapter(
    saved: SavedAdapters,
    client: ClientId,
    output: Path,
    *,
    merged: bool = False,
    dtype: str | None = None,
    rows: ObjectRows | None = None,
) -> Exported:
    """Writes an adapter, or base and adapter as one model, and proves that it says the same.

    Nothing is left at `output` where that fails.

    Args:
        saved: what the run has saved.
        client: whose adapter.
        output: a new folder.
        merged: write a whole Hugging Face model.
        dtype: one of `DTYPES`; by default that of the base for a model, float32 for an adapter.
        rows: of a run whose rows were objects.

    Raises:
        ConfigError: there is no such client or number type, or adapters of this kind have no
            weights that could be merged.
        RunFolderError: something is at `output` already.
        RunError: what was written says something else.
    """
    refuse_unknown(saved, client)
    chosen = _dtype_of(saved, merged, dtype)
    few = few_rows(saved, [client], rows)[client]
    form = request_form(saved, client, few, own_instruction=True)
    with new_folder(output) as partial:
        write = _write_merged if merged else _write_adapter
        proof = write(saved, client, partial, chosen, few)
        if form.template:
            _write_template(saved, partial, form.template, merged)
        found = Exported(
            output, client, merged, chosen, proof, few.real, bool(form.template), form.why_not
        )
        about = found.about | {"folder": "."}
        (partial / "export.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
        _write_card(saved, partial, found, form)
    return found


def _dtype_of(saved: SavedAdapters, merged: bool, dtype: str | None) -> str:
    """The number type to write.

    Raises:
        ConfigError: it is none of `DTYPES`, or adapters of this kind cannot be written in it.
    """
    kind, merges = saved.config.adapter.kind, isinstance(saved.kind, LoraKind)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    if merged and not merges:
        raise ConfigError(
            f"--merged: adapters of kind {kind!r} are read in front of the text and change no "
            "weight, so there is nothing to merge; leave --merged away"
        )
    if not merges and dtype not in (None, "float32"):
        raise ConfigError(
            f"--dtype {dtype}: adapters of kind {kind!r} are written as they were trained, in "
            "float32; leave --dtype away"
        )
    own = str(saved.kind.base.dtype).removeprefix("torch.")
    return dtype or (own if merged and own in DTYPES else "float32")


def _write_merged(
    saved: SavedAdapters, client: ClientId, folder: Path, dtype: str, few: FewRows
) -> FoldProof:
    assert isinstance(saved.kind, LoraKind), "others have no weights to merge"
    proof = write_folded(
        saved.kind,
        saved.adapters[client],
        source=_folder_of(saved, client),
        dtype=getattr(torch, dtype),
        rows=few.encoded,
        folder=folder,
        max_new_tokens=saved.config.evaluation.max_new_tokens,
    )
    copy.deepcopy(saved.kind.base.tokenizer).save_pretrained(folder)
    return proof


def _write_adapter(
    saved: SavedAdapters, client: ClientId, folder: Path, dtype: str, few: FewRows
) -> FoldProof:
    source = _folder_of(saved, client)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name != "README.md":
            shutil.copy(file, folder / file.name)
    if dtype != "float32":
        saved.kind.write(folder, _rounded(saved.adapters[client], getattr(torch, dtype)))
    wanted, bare = adapter_logits(saved.kind.base, source, few.encoded)
    found, _ = adapter_logits(saved.kind.base, folder, few.encoded)
    proof = held_against(found, wanted, bare, 0.0)
    if dtype == "float32" and proof.largest > 0:
        raise RunError(
            f"{folder}: the copy says something else than {source} (a logit differs by "
            f"{proof.largest:.3g}); the disk may be at fault: export again"
        )
    return proof


def _rounded(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    return {name: tensor.to(dtype) for name, tensor in adapter.items()}


def _folder_of(saved: SavedAdapters, client: ClientId) -> Path:
    folder = RunFolder(saved.path)
    folder.check_adapter(client)
    return folder.adapters / client


def _write_template(saved: SavedAdapters, folder: Path, template: str, merged: bool) -> None:
    """The template beside an adapter, or as part of a model's tokenizer."""
    if merged:
        tokenizer = copy.deepcopy(saved.kind.base.tokenizer)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    (folder / _TEMPLATE).write_text(template, encoding="utf-8", newline="")


def _write_card(saved: SavedAdapters, folder: Path, found: Exported, form: RequestForm) -> None:
    """README.md: what this is, how to ask it, and what was proven."""
    card = (_folder_of(saved, found.client) / "README.md").read_text(encoding="utf-8")
    if not found.merged:
        (folder / "README.md").write_text(card + "\n" + _about_export(found, form), "utf-8")
        return
    base = saved.kind.base
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---"]
    if base.published and base.published == base.name:
        head[1:1] = [f"base_model: {json.dumps(base.published)}"]
    prompt = card[card.index("## Prompt") : card.index("## Load it")]
    parts = [
        "\n".join(head),
        f"# {Path(base.name).name} with the adapter of {found.client}",
        f"Made by fedmira with `{saved.config.algorithm.name}`: the weights of the base with the "
        f"client's LoRA update added to them, in {found.dtype}. The base's sha256 is "
        f"{base.sha256}. A model can give away some of the rows that it learned from; pass it on "
        "with the care that the rows need, and under the base's licence.",
        prompt.strip(),
        _about_export(found, form).strip(),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", "utf-8")


def _about_export(found: Exported, form: RequestForm) -> str:
    lines = "\n".join(f"- {line[0].upper()}{line[1:]}." for line in found.lines()[1:])
    told = f"## This export\n\n{lines}\n"
    if not found.chat_template:
        return told
    asked = json.dumps(form.messages, ensure_ascii=False)
    told += f"\nA request, with the text in place of `{{input}}`:\n\n    {asked}\n"
    if found.merged:
        told += f"\n```python\n{_CODE.format(messages=asked)}\n```\n"
    return told


_CODE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "THIS FOLDER"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
messages = {messages}
ids = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**ids)
print(tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))"""
