"""Adapters as PEFT folders, which plain `PeftModel.from_pretrained` loads, and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedmira.adapters import Adapter
from fedmira.atomic import replace_file
from fedmira.errors import MachineError, RunFolderError
from fedmira.model.base.types import BaseModel, TargetModule
from fedmira.records import told

__all__ = [
    "ADAPTER_WEIGHTS",
    "ENCODER_WEIGHTS",
    "lora_config",
    "read_adapter",
    "read_trained",
    "write_adapter",
    "write_encoder",
]

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ENCODER_WEIGHTS = "encoder.safetensors"
"""What was trained, where that is more than what PEFT loads."""


def write_adapter(folder: Path, adapter: Adapter, config: LoraConfig) -> None:
    """Write adapter_config.json and adapter_model.safetensors into `folder`.

    Args:
        folder: made where it is missing.
        adapter: the tensors by name.
        config: what `lora_config` gave for them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    _sort_targets(folder / "adapter_config.json")
    _save(folder / ADAPTER_WEIGHTS, adapter)


def lora_config(
    base: BaseModel,
    targets: Sequence[TargetModule],
    rank: int,
    alpha: float,
    dropout: float,
    rslora: bool = False,
) -> LoraConfig:
    """PEFT's settings for adapters of this rank, as adapter_config.json has them.

    Args:
        base: the frozen base.
        targets: the linear layers that carry adapters, in the model's order.
        rank: r of the adapter.
        alpha: scale of LoRA; the branch is alpha / r times B A.
        dropout: share of the branch's inputs that are dropped in training.
        rslora: whether the branch is alpha / sqrt(r) times B A.
    """
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.known_as,
        inference_mode=True,
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]  # PEFT takes a fraction as well
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=sorted(target.name for target in targets),
        fan_in_fan_out=any(target.stored_transposed for target in targets),
        bias="none",
    )


def write_encoder(folder: Path, adapter: Adapter, config: Any, embeddings: Tensor) -> None:
    """Write what PEFT loads for inference, and the encoder beside it.

    That is adapter_config.json and adapter_model.safetensors.

    Args:
        adapter: the encoder's own parameters.
        config: PEFT's settings for inference.
        embeddings: the encoder's output.
        folder: made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    _save(folder / ADAPTER_WEIGHTS, {"prompt_embeddings": embeddings})
    _save(folder / ENCODER_WEIGHTS, adapter)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a safetensors file, so that a full disk is an OSError with the file's name.

    Safetensors' own writer raises an error of its own kind, without the file.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    replace_file(path, save(contiguous, metadata={"format": "pt"}))


def _sort_targets(path: Path) -> None:
    """PEFT writes the targets in the order of a set, which differs from process to process.

    Equal runs shall have equal files.
    """
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["target_modules"] = sorted(settings["target_modules"])
    replace_file(path, json.dumps(settings, indent=2, sort_keys=True), lasting=False)


def read_adapter(folder: Path, weights: str = ADAPTER_WEIGHTS) -> Adapter:
    """The tensors of an adapter folder.

    Args:
        weights: the name of the file.
        folder: where the files are.

    Raises:
        RunFolderError: there is no such file, or it is damaged.
        MachineError: the system does not let it be read.
    """
    path = folder / weights
    try:
        adapter: Adapter = load(path.read_bytes())
    except FileNotFoundError as error:
        raise RunFolderError(
            f"{path}: there is no adapter; the run may not have finished its first checkpoint"
        ) from error
    except OSError as error:
        raise MachineError(told(error, path)) from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunFolderError(
            f"{path}: the file is damaged ({error}); run again or take it from a copy"
        ) from error
    return adapter


def read_trained(folder: Path) -> Adapter:
    """The tensors that were trained, of an adapter of any kind.

    Args:
        folder: where the files are.

    Raises:
        RunFolderError: there is no such file, or it is damaged.
    """
    return read_adapter(
        folder, ENCODER_WEIGHTS if (folder / ENCODER_WEIGHTS).is_file() else ADAPTER_WEIGHTS
    )
