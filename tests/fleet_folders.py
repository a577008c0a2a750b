"""Adapters that real PEFT made on a tiny base, with factors that are drawn."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

__all__ = ["write_drawn"]


def write_drawn(
    base: Path, folder: Path, seed: int = 0, family: int = 0, own: float = 1.0, **settings: Any
) -> Path:
    """A PEFT folder with a common A, and a B that is the family's plus `own` times its own."""
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)  # a common start, as PEFT draws it
        model: Any = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **chosen)
        )
    for key, part in model.named_parameters():
        if "lora_B" in key:
            place = sum(map(ord, key))  # the same in all adapters that have this layer
            alike, apart = torch.Generator(), torch.Generator()
            alike.manual_seed(1000 * family + place)
            apart.manual_seed(10**6 + 10**4 * seed + place)
            drawn = torch.randn(part.shape, generator=alike)
            drawn += own * torch.randn(part.shape, generator=apart)
            part.data.copy_(0.1 * drawn)
    model.save_pretrained(str(folder))
    return folder
