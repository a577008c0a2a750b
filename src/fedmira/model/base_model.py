"""The frozen base model: loading, where adapters go, and what identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fedmira.config import EngineSettings, ModelSettings
from fedmira.errors import ModelError
from fedmira.model.allocator import keep_freed_memory
from fedmira.model.layers import LastLayer, compile_free_parts, decoder_layers, uncompile

__all__ = ["BaseModel", "TargetModule", "find_targets", "from_model", "load_base", "load_tokenizer", "with_engine_options"]

_USUAL_TARGETS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "v_proj"),
    ("c_attn",),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("query", "value"),
)


@dataclass(frozen=True, slots=True)
class TargetModule:
    """A linear layer that carries a LoRA branch.

    Attributes:
        name: its path in the model, such as "model.layers.0.self_attn.q_proj".
        inputs, outputs: sizes of its input and output, whatever way its weight is stored.
        stored_transposed: True for GPT-2's Conv1D, whose weight is inputs x outputs (PEFT's fan_in_fan_out).
    """

    name: str
    inputs: int
    outputs: int
    stored_transposed: bool


@dataclass(frozen=True)
class BaseModel:
    """A loaded, frozen base model with its tokenizer.

    Attributes:
        model: the transformers model, in eval mode, no parameter requires a gradient.
        tokenizer: its tokenizer, with a padding token.
        name: what the user called it; `location` is the folder or hub id it was loaded from.
        sha256: hash of names, shapes and bytes of all its parameters.
        packed: whether packed steps give this architecture's own result (probed); if not, the padded path is used.
        last_layer: where packed steps leave work out whose result nobody reads, or None where the probe found a difference.
        kernels: whether packed attention uses the device's own kernels (probed too).
        recomputed_layers: layers that training computes a second time in the backward pass, to save memory.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    location: str
    sha256: str
    packed: bool = False
    last_layer: LastLayer | None = None
    kernels: bool = True
    recomputed_layers: Sequence[nn.Module] = ()

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The number type of its weights."""
        return next(self.model.parameters()).dtype

    @property
    def num_parameters(self) -> int:
        """Number of its weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def num_embeddings(self) -> int:
        """Number of tokens it has embeddings for."""
        return _num_embeddings(self.model)

    @property
    def max_positions(self) -> int | None:
        """The longest sequence it can read, or None where its config does not say."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    @property
    def mixing_positions(self) -> int | None:
        """Rows longer than this change the rotary frequencies of all rows of a pass ("longrope"); None where no length does."""
        config = self.model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") != "longrope":
            return None
        limit = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        return int(limit) if limit else None


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
            f"model.base {settings.base!r}: its tokenizer has no end-of-sequence token, so a response could never end; set "
            "eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(settings: ModelSettings) -> BaseModel:
    """Load the base model, frozen and in eval mode, and probe whether packed steps agree with it.

    Raises:
        ModelError: it cannot be loaded, the device is not there, or its vocabulary is smaller than the tokenizer's.
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
        model = AutoModelForCausalLM.from_pretrained(location, trust_remote_code=False, **(quantized or {"dtype": "auto"}))
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(_cannot_load("model", settings.base, error)) from error
    if quantized:
        return from_model(model, tokenizer, settings.base, location)  # its numbers stay as and where bitsandbytes has put them
    # Hashed as it is stored: the same base has the same hash on every device and in every dtype.
    return from_model(model, tokenizer, settings.base, location, dtype, device)


def from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    location: str = "",
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> BaseModel:
    """Freeze a model that is already in memory and wrap it.

    Args:
        dtype, device: where it shall compute; None leaves it as it is.

    Raises:
        ModelError: the tokenizer has more tokens than the model has embeddings.
    """
    model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
    embeddings = _num_embeddings(model)
    if len(tokenizer) > embeddings:
        raise ModelError(
            f"model.base {name!r}: the tokenizer has {len(tokenizer)} tokens but the model only {embeddings} embeddings; they do "
            "not belong together"
        )
    base = BaseModel(model, tokenizer, name, location or name, _hash(model.state_dict()))
    if dtype is not None or device is not None:
        model.to(dtype=dtype or base.dtype, device=device or base.device)  # type: ignore[call-arg]
    # Generation is greedy for everybody: penalties and beams of the checkpoint would be taken up silently.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=model.generation_config.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    from fedmira.model.probe import choose_path

    return choose_path(base)


def with_engine_options(base: BaseModel, settings: EngineSettings, targets: Sequence[TargetModule]) -> BaseModel:
    """The base with its layers recomputed or compiled, as [engine] asks for; what an earlier run on it had asked for is undone.

    Raises:
        ModelError: the architecture's layers cannot be told apart, or none of their parts is free of adapters.
    """
    layers = decoder_layers(base.model)
    uncompile(layers)
    wanted = [f"engine.{name}" for name in ("recompute", "compile") if getattr(settings, name)]
    if wanted and not layers:
        raise ModelError([f"{name}: the layers of {type(base.model).__name__} cannot be found; set it to false" for name in wanted])
    if settings.compile and not compile_free_parts(layers, [base.model.get_submodule(target.name) for target in targets]):
        raise ModelError("engine.compile: every part of every layer carries an adapter; set it to false or choose fewer adapter.targets")
    return replace(base, recomputed_layers=tuple(layers) if settings.recompute else ())


def find_targets(model: nn.Module, wanted: Sequence[str]) -> list[TargetModule]:
    """The linear layers whose name ends in one of `wanted`, in the model's order; empty `wanted` takes the usual ones.

    Raises:
        ModelError: a wanted name matches nothing, or matches something that is not linear; lists what exists.
    """
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and not _is_head(model, module)
    }
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if not wanted:
        wanted = next((usual for usual in _USUAL_TARGETS if set(usual) <= set(suffixes)), ())
        if not wanted:
            raise ModelError(f"adapter.targets: no usual layer was found in {type(model).__name__}; choose from {', '.join(suffixes)}")
    unknown = [name for name in wanted if not any(_matches(path, name) for path in linear)]
    if unknown:
        raise ModelError(
            [
                f"adapter.targets: {name!r} is no linear layer of {type(model).__name__}; choose from {', '.join(suffixes)}"
                for name in unknown
            ]
        )
    return [_describe(path, module) for path, module in linear.items() if any(_matches(path, name) for name in wanted)]


def _num_embeddings(model: PreTrainedModel) -> int:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def _matches(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _quantized(settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What from_pretrained must be told to quantise, empty where nothing is asked for.

    Raises:
        ModelError: the device is not CUDA, or bitsandbytes is not installed.
    """
    if settings.quantization == "none":
        return {}
    if device.type != "cuda":
        raise ModelError(
            f"model.quantization {settings.quantization!r} needs a CUDA device, and model.device is {device.type!r} here; set it to 'none'"
        )
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization {settings.quantization!r} needs bitsandbytes; install it with: pip install 'fedmira[quantized]'"
        )
    four = settings.quantization == "4bit"
    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_8bit=not four, load_in_4bit=four, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "dtype": dtype, "device_map": {"": device}}


def _describe(path: str, module: nn.Module) -> TargetModule:
    if isinstance(module, nn.Linear):  # a quantised weight has another shape than the layer
        return TargetModule(path, module.in_features, module.out_features, False)
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return TargetModule(path, rows, columns, True)


def _is_head(model: nn.Module, module: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) and module is model.get_output_embeddings()  # type: ignore[no-untyped-call]


def _location(base: str) -> str:
    if base == "bundled":
        return str(resources.files("fedmira") / "bundled" / "base")
    path = Path(base).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise ModelError(f"model.base {base!r}: the folder has no config.json; give a folder in Hugging Face format")
        return str(path.resolve())
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise ModelError(f"model.base {base!r}: there is no such folder; give 'bundled', a local Hugging Face folder, or a hub id")
    return base


def _cannot_load(what: str, base: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"model.base {base!r}: the {what} cannot be loaded ({reason}); give 'bundled', a local Hugging Face folder, or a hub id that "
        "can be reached"
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"model.device {name!r} cannot be used here ({str(error).splitlines()[0]}); use 'auto' or 'cpu'") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    dtype: Any = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _hash(state: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
