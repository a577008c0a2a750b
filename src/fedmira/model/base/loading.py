"""Loading the frozen base model, and what identifies it."""

from __future__ import annotations

from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from fedmira.adapters import content_hash
from fedmira.config import ModelSettings
from fedmira.errors import ModelError
from fedmira.model.base.allocator import keep_freed_memory
from fedmira.model.base.types import BaseModel, num_embeddings

__all__ = ["OBJECT", "freeze", "load_tokenizer", "read_base"]

OBJECT = "object"
"""model.base of a run whose base was given as an object."""


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer alone, with a padding token (the end-of-sequence token where it has none).

    Raises:
        ModelError: there is no tokenizer there, or it has no end-of-sequence token.
    """
    location = _location(settings.base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(_cannot_load("tokenizer", settings.base, error)) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model.base {settings.base!r}: its tokenizer has no end-of-sequence token, so "
            "a response could never end; set "
            "eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_base(settings: ModelSettings) -> BaseModel:
    """Load the base model, frozen and in eval mode; how its passes are made is not known yet.

    Raises:
        ModelError: it cannot be loaded, the device is not there, or its vocabulary is smaller than
            the tokenizer's.
    """
    device = _device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    dtype = _dtype(settings.dtype, device)
    tokenizer = load_tokenizer(settings)
    location = _location(settings.base)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    quantized = _quantized(settings, device, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            location, trust_remote_code=False, **(quantized or {"dtype": "auto"})
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(_cannot_load("model", settings.base, error)) from error
    if quantized:
        return freeze(
            model, tokenizer, settings.base, location
        )  # its numbers stay as and where bitsandbytes has put them
    # Hashed as it is stored: the same base has the same hash on every device and in every dtype.
    return freeze(model, tokenizer, settings.base, location, dtype, device)


def freeze(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    location: str = "",
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> BaseModel:
    """Freeze a model that is already in memory and wrap it.

    How its passes are made is not known yet.

    Args:
        dtype, device: where it shall compute; None leaves it as it is.

    Raises:
        ModelError: the tokenizer has more tokens than the model has embeddings.
    """
    model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
    embeddings = num_embeddings(model)
    if len(tokenizer) > embeddings:
        raise ModelError(
            f"model.base {name!r}: the tokenizer has {len(tokenizer)} tokens but the model "
            f"only {embeddings} embeddings; they do "
            "not belong together"
        )
    base = BaseModel(model, tokenizer, name, location or name, content_hash(model.state_dict()))
    if dtype is not None or device is not None:
        model.to(dtype=dtype or base.dtype, device=device or base.device)  # type: ignore[call-arg]
    # Generation is greedy for everybody: penalties and beams of the checkpoint would be taken up
    # silently.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    return base


def _quantized(settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What from_pretrained must be told to quantise, empty where nothing is asked for.

    Raises:
        ModelError: the device is not CUDA, or bitsandbytes is not installed.
    """
    if settings.quantization == "none":
        return {}
    if device.type != "cuda":
        raise ModelError(
            f"model.quantization {settings.quantization!r} needs a CUDA device, and "
            f"model.device is {device.type!r} here; set it to 'none'"
        )
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization {settings.quantization!r} needs bitsandbytes; install it "
            "with: pip install 'fedmira[quantized]'"
        )
    four = settings.quantization == "4bit"
    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_8bit=not four,
        load_in_4bit=four,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "dtype": dtype, "device_map": {"": device}}


def _location(base: str) -> str:
    if base == OBJECT:
        raise ModelError(
            "model.base = 'object': the base of this run was an object of Python, which no "
            "file holds; give it "
            "again: fedmira.run(base=(model, tokenizer), ...) or fedmira.load(folder, base=...)"
        )
    if base == "bundled":
        return str(resources.files("fedmira") / "bundled" / "base")
    path = Path(base).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"model.base {base!r}: the folder has no config.json; give a folder in "
                "Hugging Face format"
            )
        return str(path.resolve())
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise ModelError(
            f"model.base {base!r}: there is no such folder; give 'bundled', a local "
            "Hugging Face folder, or a hub id"
        )
    return base


def _cannot_load(what: str, base: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"model.base {base!r}: the {what} cannot be loaded ({reason}); give 'bundled', a "
        "local Hugging Face folder, or a hub id that "
        "can be reached"
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"model.device {name!r} cannot be used here ({str(error).splitlines()[0]}); "
            "use 'auto' or 'cpu'"
        ) from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = (
            "bfloat16"
            if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            else "float32"
        )
    dtype: Any = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
