"""What the files of a base say before it is built.

Weights that cannot be those of its config.json.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fedmira.errors import ModelError

__all__ = [
    "check_folder",
    "check_sizes",
    "holds_tokenizer",
    "listed",
    "published_name",
    "refuse_odd_numbers",
]

_NUMBERS = ("F64", "F32", "F16", "BF16")
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model")
_VOCABULARIES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken", "tiktoken")
_ABOUT_TOKENIZERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_PUBLISHED = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SLACK = 2
"""A model may be larger than its files, by parts that are tied or made anew, but not twice."""


def check_folder(folder: Path, name: str) -> None:
    """Refuse a folder that holds more or less than a base.

    Args:
        name: what the user called it.
        folder: where the files are.

    Raises:
        ModelError: it has no config.json, holds an adapter too, or its tokenizer needs a package
            that is not installed.
    """
    said = f"model.base {name!r}"
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{said}: the folder has no config.json; give a folder in Hugging Face format"
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{said}: the folder also holds adapter_config.json, and transformers would load that "
            "adapter into the base; merge it into the base, or move adapter_config.json and its "
            "weights to another folder"
        )
    pieces = next((file for file in _SENTENCEPIECE if (folder / file).is_file()), None)
    if pieces and not (folder / "tokenizer.json").is_file() and not find_spec("sentencepiece"):
        raise ModelError(
            f"{said}: its tokenizer is {pieces} alone, which needs the package sentencepiece; "
            "install it with: pip install 'fedmira[sentencepiece]'"
        )


def holds_tokenizer(folder: Path) -> bool:
    """Whether a file in the folder may be the vocabulary of a tokenizer."""
    return any(
        file.name not in _ABOUT_TOKENIZERS and any(part in file.name for part in _VOCABULARIES)
        for file in folder.iterdir()
    )


def published_name(location: str, name: str) -> str:
    """The name under which a base can be had from the hub, "" where none is known.

    Args:
        location: the folder or the hub id it is loaded from.
        name: the one that the user gave it in `model.name`, "" for none.
    """
    if name:
        return name
    folder = Path(location)
    if not folder.is_dir():
        return location
    found = _read_json(folder / "config.json").get("_name_or_path", "")
    named = isinstance(found, str) and _PUBLISHED.fullmatch(found)
    return str(found) if named and not (folder / found).exists() else ""


def check_sizes(location: str, name: str, config: PreTrainedConfig) -> None:
    """Refuses a config.json that asks for a far larger model than the weights, before it is built.

    Args:
        location: the folder of the base.
        name: what messages call the base.
        config: config.json as transformers read it.

    Raises:
        ModelError: it does, or a file of weights is damaged.
    """
    shapes = _shapes(Path(location), name)
    if not shapes or getattr(config, "quantization_config", None):
        return
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(shapes):
        raise ModelError(
            f"model.base {name!r}: config.json says num_hidden_layers = {layers}, but there are "
            f"only {len(shapes)} tensors of weights; put in the config.json of these weights"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # type: ignore[no-untyped-call]
    wanted = {key: tuple(tensor.shape) for key, tensor in model.named_parameters()}
    numbers = sum(tensor.numel() for tensor in model.parameters())
    stored = sum(torch.Size(shape).numel() for shape, _ in shapes.values())
    if numbers > _SLACK * stored:
        other = [
            f"{key} has {list(shape)} in the file, {list(wanted[key])} by config.json"
            for key, (shape, _) in shapes.items()
            if key in wanted and wanted[key] != shape
        ]
        raise ModelError(
            f"model.base {name!r}: config.json asks for {numbers:,} numbers, but the weights are "
            f"{stored:,}{': ' if other else ''}{listed(other)}; put in the config.json of these "
            "weights"
        )


def refuse_odd_numbers(location: str, name: str, model: PreTrainedModel) -> None:
    """Refuses weights that are stored as unfit numbers without a word about it in config.json.

    Args:
        location: the folder of the base.
        name: what messages call the base.
        model: the model as it was loaded.

    Raises:
        ModelError: names them.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return
    buffers = {key for key, _ in model.named_buffers()}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"(^|\.)position_ids$"]
    odd = [
        f"{key} ({kind})"
        for key, (_, kind) in _shapes(Path(location), name).items()
        if kind not in _NUMBERS
        and not any(key == buffer or buffer.endswith("." + key) for buffer in buffers)
        and not any(re.search(pattern, key) for pattern in ignored)
        and not re.search(r"\.attn\.(masked_)?bias$|rotary_emb|\.attention\.(masked_)?bias$", key)
    ]
    if odd:
        raise ModelError(
            f"model.base {name!r}: weights are stored as other numbers than floating point ones, "
            f"and config.json has no quantization_config: {listed(odd)}; give the base as it was "
            "before it was quantised"
        )


def listed(names: Sequence[str]) -> str:
    """At most six names, and how many more there are."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


def _shapes(folder: Path, name: str) -> Mapping[str, tuple[tuple[int, ...], str]]:
    """Tensor -> its shape and number type in the folder's safetensors files.

    None where there are no such files.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        placed = _read_json(index).get("weight_map", {})
        files = sorted({str(file) for file in placed.values()}) if isinstance(placed, dict) else []
    else:
        files = ["model.safetensors"] if (folder / "model.safetensors").is_file() else []
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise ModelError(
            f"model.base {name!r}: {index.name} names files that are not there: "
            f"{listed(absent)}; copy them to {folder}"
        )
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - it is no mapping
                    part = opened.get_slice(key)
                    found[key] = (tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"model.base {name!r}: {file} is damaged or cut short "
                f"({str(error).splitlines()[0]}); copy or download it again"
            ) from error
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the file holds none.

    Whoever loads the base says what is wrong with it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
