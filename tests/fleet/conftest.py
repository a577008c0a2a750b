"""Adapters that real PEFT made on a tiny base, and the logits that real PEFT makes of folders."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from small import write_base

Make = Callable[..., Path]
IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("fleet") / "base")


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Make:
    """Writes a PEFT folder whose factors are drawn, `shared` of B alike for all of one family."""

    def made(name: str, seed: int = 0, family: int = 0, own: float = 1.0, **settings: Any) -> Path:
        chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings}
        torch.manual_seed(0)  # a common start, as PEFT draws it
        model = wrapped(base, LoraConfig(task_type="CAUSAL_LM", **chosen))
        for place, (key, part) in enumerate(model.named_parameters()):
            if "lora_B" in key:
                alike, apart = torch.Generator(), torch.Generator()
                alike.manual_seed(1000 * family + place)
                apart.manual_seed(10**6 + 1000 * seed + place)
                drawn = torch.randn(part.shape, generator=alike)
                drawn += own * torch.randn(part.shape, generator=apart)
                part.data.copy_(0.1 * drawn)
        model.save_pretrained(str(tmp_path / name))
        return tmp_path / name

    return made


def wrapped(base: Path, config: LoraConfig) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)


@pytest.fixture
def logits(base: Path) -> Callable[..., Tensor]:
    """What plain PEFT makes of a folder, or of several that are active together."""

    def made(folder: Path, *more: Path) -> Tensor:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            plain = AutoModelForCausalLM.from_pretrained(base)
            model = PeftModel.from_pretrained(plain, str(folder), adapter_name="first")
            for number, other in enumerate(more):
                model.load_adapter(str(other), adapter_name=str(number))
            names = ["first", *(str(number) for number in range(len(more)))]
            model.base_model.set_adapter(names)
            return model.eval()(IDS).logits

    return made
