"""Loading the frozen base model, and what identifies it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from importlib import resources
from importlib.util import find_spec
from logging import CRITICAL
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 - what damaged .bin files raise; nothing is unpickled here
from typing import Any, Literal, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from fedmira.adapters import content_hash
from fedmira.config import ModelSettings
from fedmira.errors import ModelError
from fedmira.model.base.allocator import keep_freed_memory
from fedmira.model.base.files import (
    check_folder,
    check_sizes,
    holds_tokenizer,
    listed,
    published_name,
    refuse_odd_numbers,
)
from fedmira.model.base.hashing import base_hash, files_of
from fedmira.model.base.types import BaseModel, num_embeddings
from fedmira.records import check_files

__all__ = ["OBJECT", "freeze", "load_tokenizer", "read_again", "read_base", "read_folder"]

OBJECT = "object"
"""model.base of a run whose base was given as an object."""
_log = logging.getLogger("fedmira")
_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    ImportError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    MemoryError,
    SafetensorError,
    StrictDataclassError,
    UnpicklingError,
)
"""What transformers raises where a folder is damaged or its config.json says impossible things."""


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer alone, with a padding token (the end-of-sequence token where it has none).

    Raises:
        ModelError: there is no tokenizer there, or it has no end-of-sequence token.
    """
    location = _location(settings.base)
    _read_config(location, settings.base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except Exception as error:  # what the tokenizers package raises is an Exception, and no more
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


def read_base(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerBase | None = None
) -> BaseModel:
    """Load the base model, frozen and in eval mode; how its passes are made is not known yet.

    Args:
        settings: the [model] section.
        tokenizer: its tokenizer, where it was loaded already.

    Raises:
        ModelError: it cannot be loaded, its files do not say all of it, a weight is no finite
            number, or the device is not there.
    """
    device = _device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    dtype = _dtype(settings.dtype, device)
    tokenizer = tokenizer or load_tokenizer(settings)
    location = _location(settings.base)
    check_files(Path(location))  # merged models and emulators were recorded when they were written
    quantized = _quantized(settings, device, dtype)
    how = f"{settings.quantization} {dtype} {device}" if quantized else "as stored"
    files = files_of(location, how)
    model = _read_model(location, settings.base, quantized or {"dtype": "auto"})
    # Hashed as it is stored: the same base has the same hash on every device and in every dtype.
    state_hash = base_hash(model, files, files_of(location, how))
    published = published_name(location, settings.name)
    if quantized:  # its numbers stay as and where bitsandbytes has put them
        return freeze(
            model, tokenizer, settings.base, location, published=published, sha256=state_hash
        )
    return freeze(model, tokenizer, settings.base, location, dtype, device, published, state_hash)


def _read_model(location: str, name: str, options: Mapping[str, Any]) -> PreTrainedModel:
    """The model that the files hold, and nothing drawn at random in it.

    Raises:
        ModelError: it cannot be loaded, or tensors are missing, left over, of other sizes, or of
            other number types.
    """
    loudness = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity(CRITICAL)  # what it reports is raised below
    try:
        config = _read_config(location, name)
        text = config.get_text_config()
        if (getattr(text, "pad_token_id", None) or 0) >= getattr(text, "vocab_size", math.inf):
            text.pad_token_id = None  # padding is masked: that token needs no embedding
            options = {**options, "config": config}
        check_sizes(location, name, config)
        # Other sizes are asked for here and refused below, where they are named.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except _UNREADABLE as error:
        raise ModelError(_cannot_load("model", name, error)) from error
    finally:
        transformers_logging.set_verbosity(loudness)
    model, info = loaded
    _check_complete(name, info)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"model.base {name!r}: it comes with an adapter (adapter_config.json), which "
            "transformers has loaded into it; give the base alone, or merge the adapter into it"
        )
    refuse_odd_numbers(location, name, model)
    return cast(PreTrainedModel, model)


def read_folder(folder: Path) -> PreTrainedModel:
    """A model that was just written, on the CPU and in the number type in which it is stored.

    Args:
        folder: a Hugging Face folder.

    Raises:
        ModelError: it is not what its files say.
    """
    model = _read_model(str(folder), str(folder), {"dtype": "auto"})
    model.eval()  # type: ignore[no-untyped-call]
    return model


def read_again(
    base: BaseModel, dtype: torch.dtype | Literal["auto"] | None = None
) -> PreTrainedModel:
    """The same base once more, where and in the number type in which the first one computes.

    Args:
        base: what `load_base` gave.
        dtype: in place of that number type; "auto" for that in which it is stored.

    Raises:
        ModelError: it is no longer there.
    """
    model = _read_model(base.location, base.name, {"dtype": dtype or base.dtype})
    model.eval()  # type: ignore[no-untyped-call]
    model.to(device=base.device)  # type: ignore[call-arg]
    return model


def _read_config(location: str, name: str) -> PreTrainedConfig:
    """What config.json says.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    except _UNREADABLE as error:
        raise ModelError(_cannot_load("config.json", name, error)) from error
    return cast(PreTrainedConfig, config)


def _check_complete(name: str, info: Mapping[str, Any]) -> None:
    """Refuse a model that is not what its files hold, by what transformers says of the loading.

    Raises:
        ModelError: names the tensors.
    """
    said = f"model.base {name!r}"
    problems = []
    if missing := sorted(info["missing_keys"]):
        problems.append(
            f"{said}: its weights lack {listed(missing)}, which would be drawn at random; copy or "
            "download the base again, or put in the config.json that belongs to these weights"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        problems.append(
            f"{said}: its weights hold {listed(unexpected)}, which its architecture does not have "
            "and would leave out; put in the config.json that belongs to these weights"
        )
    if mismatched := [
        f"{key} has {list(stored)} in the file, {list(wanted)} by config.json"
        for key, stored, wanted in sorted(info["mismatched_keys"])
    ]:
        problems.append(
            f"{said}: sizes in config.json and weights differ: {listed(mismatched)}; put in the "
            "config.json that belongs to these weights"
        )
    problems += [f"{said}: {str(text).splitlines()[0]}" for text in info["error_msgs"] if text]
    if problems:
        raise ModelError(problems)


def freeze(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    location: str = "",
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    published: str = "",
    sha256: str = "",
) -> BaseModel:
    """Freeze a model that is already in memory and wrap it.

    How its passes are made is not known yet.

    Args:
        dtype, device: where it shall compute; None leaves it as it is.
        published: the name under which others can have it, "" where there is none.
        sha256: what `base_hash` gave; "" hashes the model.
        model: a causal language model of transformers; changed in place.
        tokenizer: that of the model.
        name: what messages call the base.
        location: its folder; empty for a model in memory.

    Raises:
        ModelError: a weight is no finite number, or the model has no embedding for the token that
            ends a response.
    """
    model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
    _fit_special_tokens(tokenizer, num_embeddings(model), name)
    _refuse_infinite(model, name)
    state_hash = sha256 or content_hash(model.state_dict())
    base = BaseModel(model, tokenizer, name, location or name, state_hash, published=published)
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


def _fit_special_tokens(tokenizer: PreTrainedTokenizerBase, embeddings: int, name: str) -> None:
    """See to it that padding and the end of a response have embeddings.

    Padding is masked, so any token can pad; other ids matter where rows use them.

    Raises:
        ModelError: the end-of-sequence token has none.
    """
    if tokenizer.eos_token_id >= embeddings:
        raise ModelError(
            f"model.base {name!r}: its end-of-sequence token {tokenizer.eos_token!r} has id "
            f"{tokenizer.eos_token_id}, but the model has {embeddings} embeddings; set eos_token "
            "in its tokenizer_config.json, or resize the embeddings"
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= embeddings:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > embeddings:
        _log.warning(
            "%s: the tokenizer has %d tokens and the model %d embeddings; rows that use an id of "
            "%d or more are refused",
            name,
            len(tokenizer),
            embeddings,
            embeddings,
        )


def _refuse_infinite(model: PreTrainedModel, name: str) -> None:
    """Raises a ModelError that names weights which are NaN or infinite."""
    bad = [
        key
        for key, tensor in model.named_parameters()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if bad:
        raise ModelError(
            f"model.base {name!r}: weights are NaN or infinite in {listed(bad)}; copy or download "
            "the base again"
        )


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
        check_folder(path, base)
        return str(path.resolve())
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise ModelError(
            f"model.base {base!r}: there is no such folder; give 'bundled', a local "
            "Hugging Face folder, or a hub id; a relative path begins at the folder where the "
            f"command is started, here {Path.cwd()}"
        )
    return base


def _cannot_load(what: str, base: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [""])[0]
    reason = reason or type(error).__name__
    if isinstance(error, (LookupError, AttributeError, TypeError, ArithmeticError)):
        reason = f"{type(error).__name__}: {reason}"
    folder = Path(base).expanduser()
    if what == "tokenizer" and folder.is_dir() and not holds_tokenizer(folder):
        return (
            f"model.base {base!r}: the folder has no tokenizer (tokenizer.json or the like); copy "
            "the tokenizer's files into it"
        )
    if "sentencepiece" in str(error).lower() or "tiktoken" in str(error).lower():
        return (
            f"model.base {base!r}: the {what} cannot be loaded without the package sentencepiece; "
            "install it with: pip install 'fedmira[sentencepiece]'"
        )
    if folder.is_dir():
        return (
            f"model.base {base!r}: the {what} cannot be loaded ({reason}); copy or download the "
            "folder again, or give another base"
        )
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
