"""Adapters as PEFT folders, which plain `PeftModel.from_pretrained` loads, and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
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
    "CONFIG",
    "ENCODER_WEIGHTS",
    "config_text",
    "encoder_files",
    "lora_config",
    "read_adapter",
    "read_trained",
    "weights",
    "write_adapter",
    "write_files",
]

CONFIG = "adapter_config.json"

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
    write_files(folder, {CONFIG: config_text(config), ADAPTER_WEIGHTS: weights(adapter)})


def write_files(folder: Path, files: Mapping[str, str | bytes], *, lasting: bool = True) -> None:
    """Write the files of an adapter's folder.

    Args:
        folder: made where it is missing.
        files: name -> content.
        lasting: the disk holds the weights when this returns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        # Bytes and not safetensors' own writer, whose error on a full disk does not name the file.
        replace_file(folder / name, content, lasting=lasting and name != CONFIG)


def config_text(config: Any) -> str:
    """adapter_config.json as PEFT writes it, with the targets in one order.

    PEFT writes them in the order of a set, which differs from process to process, and equal runs
    shall have equal files.

    Args:
        config: PEFT's settings of an adapter.
    """
    with TemporaryDirectory() as place:
        config.save_pretrained(place)
        settings = json.loads((Path(place) / CONFIG).read_text(encoding="utf-8"))
    if isinstance(settings.get("target_modules"), list):
        settings["target_modules"] = sorted(settings["target_modules"])
    return json.dumps(settings, indent=2, sort_keys=True)


def weights(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as the content of a safetensors file.

    Args:
        tensors: by name.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    return save(contiguous, metadata={"format": "pt"})


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


def encoder_files(adapter: Adapter, config: Any, embeddings: Tensor) -> dict[str, str | bytes]:
    """What PEFT loads for inference, and the encoder beside it.

    That is adapter_config.json and adapter_model.safetensors.

    Args:
        adapter: the encoder's own parameters.
        config: PEFT's settings for inference.
        embeddings: the encoder's output.
    """
    return {
        CONFIG: config_text(config),
        ADAPTER_WEIGHTS: weights({"prompt_embeddings": embeddings}),
        ENCODER_WEIGHTS: weights(adapter),
    }


def read_adapter(folder: Path, file: str = ADAPTER_WEIGHTS) -> Adapter:
    """The tensors of an adapter folder.

    Args:
        file: the name of the file.
        folder: where the files are.

    Raises:
        RunFolderError: there is no such file, or it is damaged.
        MachineError: the system does not let it be read.
    """
    path = folder / file
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
