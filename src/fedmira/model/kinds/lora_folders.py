"""LoRA folders of plain PEFT, whoever made them: read with their true scales, and written again.

Only what is a sum of s B A on linear layers is read. Everything else that PEFT can put into such a
folder is refused by name, since an adapter that is read without it would be another one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from fedmira.adapters import Adapter, all_finite, folded, modules, scale
from fedmira.adapters.low_rank import DOWN, UP
from fedmira.errors import RunError, RunFolderError
from fedmira.model.base.files import listed
from fedmira.model.kinds.peft_files import ADAPTER_WEIGHTS, read_adapter, write_adapter

__all__ = ["LoraFolder", "read_lora_folder", "write_alike", "write_lora_folder"]

_CONFIG = "adapter_config.json"
_UNREAD = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
"""Keys that do not change what the tensors mean, or that are read here."""
_PLAIN_STARTS = (None, True, False, "eva", "gaussian", "orthogonal")
"""Values of init_lora_weights that leave the base as it is; others move part of it into A and B."""


@dataclass(frozen=True)
class LoraFolder:
    """A plain LoRA adapter from a folder.

    Attributes:
        name: what it is called here.
        path: the folder.
        settings: adapter_config.json.
        tensors: parameter name -> factor, as stored.
        scales: s of each module, alpha / r or alpha / sqrt(r).
    """

    name: str
    path: Path
    settings: Mapping[str, Any]
    tensors: Adapter
    scales: Mapping[str, float]

    @cached_property
    def update(self) -> Adapter:
        """s B A, with the scale in B."""
        return folded(self.tensors, self.scales)

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """Module -> its rank."""
        return {module: len(down) for module, (down, _) in modules(self.tensors).items()}

    @property
    def base(self) -> str:
        """What the folder calls its base, "" where it says nothing."""
        return str(self.settings.get("base_model_name_or_path") or "")

    @property
    def revision(self) -> str:
        """Of the base, "" where the folder says none."""
        return str(self.settings.get("revision") or "")

    @property
    def size(self) -> int:
        """Bytes of its tensors, as stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def read_lora_folder(path: Path, name: str = "") -> LoraFolder:
    """Read a folder that plain PEFT loads.

    Args:
        path: the folder, with adapter_config.json and adapter_model.safetensors.
        name: what it is called; the folder's own name by default.

    Raises:
        RunFolderError: it is none, or holds more or other than LoRA on linear layers; all problems
            together.
    """
    settings = _settings(path)
    if problems := [f"{path}: {problem}" for problem in _unfit(settings)]:
        raise RunFolderError(problems)
    if not (path / ADAPTER_WEIGHTS).is_file() and (path / "adapter_model.bin").is_file():
        raise RunFolderError(
            f"{path}: its weights are adapter_model.bin, a pickle, which can run code; load it "
            f"with PEFT where you trust it and save it again as {ADAPTER_WEIGHTS}"
        )
    tensors = read_adapter(path)
    if strange := sorted(key for key in tensors if not key.endswith((DOWN, UP))):
        raise RunFolderError(
            f"{path}: it holds {listed(strange)}, which are no LoRA factors of linear layers "
            f"(...{DOWN}, ...{UP}); only those are read"
        )
    try:
        parts = modules(tensors)
    except RunError as error:
        raise RunFolderError([f"{path}: {line}" for line in str(error).splitlines()]) from error
    if not parts or not all_finite(tensors):
        what = "numbers that are NaN or infinite" if parts else "no LoRA factors"
        raise RunFolderError(f"{path}: {ADAPTER_WEIGHTS} holds {what}; take it from a copy")
    scales, problems = {}, []
    for module, (down, _) in parts.items():
        rank, alpha = _of_module(settings, module)
        if rank != len(down):
            problems.append(
                f"{path}: {module} has rank {len(down)}, and {_CONFIG} says {rank}; plain PEFT "
                "would not load it"
            )
        scales[module] = scale(alpha, len(down), bool(settings.get("use_rslora")))
    if problems:
        raise RunFolderError(problems[:6])
    return LoraFolder(name or path.resolve().name, path, settings, tensors, scales)


def _settings(path: Path) -> dict[str, Any]:
    """adapter_config.json.

    Raises:
        RunFolderError: there is none, or it is damaged.
    """
    try:
        found = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFolderError(
            f"{path}: there is no {_CONFIG}; give a folder that plain PEFT loads, or a run folder"
        ) from error
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{path}: {_CONFIG} cannot be read ({error}); take it from a copy"
        ) from error
    if not isinstance(found, dict):
        raise RunFolderError(f"{path}: {_CONFIG} is no JSON object; take it from a copy")
    return found


def _unfit(settings: Mapping[str, Any]) -> list[str]:
    """Why an adapter with these settings is not a sum of s B A, a sentence each."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        return [f"peft_type is {kind!r}; only 'LORA' can be put together with others"]
    problems = []
    if settings.get("use_dora"):
        problems.append(
            "use_dora is true: DoRA divides by the norm of the changed weight, so its updates do "
            "not add up; only plain LoRA can be put together"
        )
    if settings.get("bias", "none") != "none":
        problems.append(f"bias is {settings['bias']!r}: biases were trained beside LoRA")
    if saved := settings.get("modules_to_save"):
        problems.append(f"modules_to_save is {saved!r}: whole layers were trained beside LoRA")
    start = settings.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        problems.append(
            f"init_lora_weights is {start!r}, which changes the base when it is loaded; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    told = {"use_dora", "bias", "modules_to_save"}
    for key in sorted(settings.keys() - _UNREAD - told):
        if settings[key]:
            problems.append(
                f"{key} is {settings[key]!r}, which is not known to leave LoRA as it is; only "
                "plain LoRA can be put together"
            )
    return problems


def _of_module(settings: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and alpha of a module, by the patterns as PEFT reads them."""
    path = module.removeprefix("base_model.model.")

    def found(patterns: object, usual: Any) -> Any:
        for key, value in patterns.items() if isinstance(patterns, dict) else ():
            if re.match(rf"(.*\.)?({key})$", path):
                return value
        return usual

    rank = found(settings.get("rank_pattern"), settings.get("r", 8))
    return int(rank), float(found(settings.get("alpha_pattern"), settings.get("lora_alpha", 8)))


def write_alike(folder: Path, like: LoraFolder, adapter: Adapter) -> None:
    """Write an adapter with the settings and number types of another one.

    Args:
        folder: made where it is missing.
        like: whose adapter_config.json is written again, byte for byte.
        adapter: of the same names, ranks and scales.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, _typed(adapter, like), _config(like, like.ranks, like.scales))
    (folder / _CONFIG).write_bytes((like.path / _CONFIG).read_bytes())


def _typed(adapter: Adapter, like: LoraFolder) -> dict[str, Tensor]:
    return {name: tensor.to(like.tensors[name].dtype) for name, tensor in adapter.items()}


def write_lora_folder(
    folder: Path,
    like: LoraFolder,
    adapter: Adapter,
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
) -> None:
    """Write an adapter that plain PEFT loads, float32.

    Args:
        folder: made where it is missing.
        like: an adapter of the same base.
        adapter: its factors.
        ranks: of each module.
        scales: s of each module, as alpha / r.
    """
    config = _config(like, ranks, scales)
    write_adapter(folder, {name: part.to(torch.float32) for name, part in adapter.items()}, config)


def _config(like: LoraFolder, ranks: Mapping[str, int], scales: Mapping[str, float]) -> LoraConfig:
    """PEFT's settings; patterns name only the modules that differ from the most frequent pair."""
    pairs = {module: (ranks[module], ranks[module] * scales[module]) for module in ranks}
    rank, alpha = max(pairs.values(), key=list(pairs.values()).count)
    patterns: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for module, (own_rank, own_alpha) in pairs.items():
        key = re.escape(module.removeprefix("base_model.model."))
        if own_rank != rank:
            patterns[0][key] = own_rank
        if own_alpha != alpha:
            patterns[1][key] = _number(own_alpha)
    settings = like.settings
    return LoraConfig(
        task_type=settings.get("task_type"),
        base_model_name_or_path=settings.get("base_model_name_or_path"),
        revision=settings.get("revision"),
        inference_mode=True,
        r=rank,
        lora_alpha=_number(alpha),  # type: ignore[arg-type]  # PEFT takes a fraction as well
        lora_dropout=0.0,
        target_modules=sorted(module.removeprefix("base_model.model.") for module in ranks),
        fan_in_fan_out=bool(settings.get("fan_in_fan_out")),
        bias="none",
        rank_pattern=patterns[0],
        alpha_pattern=patterns[1],
    )


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value
