"""A tiny base, adapters on it, and the logits that real PEFT makes of folders."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from fleet_folders import write_drawn
from small import write_base

Make = Callable[..., Path]
IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("fleet") / "base")


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Make:
    """Writes a PEFT folder of a name; see `write_drawn`."""
    return lambda name, *arguments, **settings: write_drawn(
        base, tmp_path / name, *arguments, **settings
    )


@pytest.fixture
def logits(base: Path) -> Callable[..., Tensor]:
    """What plain PEFT makes of a folder, or of several that are active together."""

    def made(folder: Path, *more: Path, ids: Tensor = IDS) -> Tensor:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            plain = AutoModelForCausalLM.from_pretrained(base)
            model = PeftModel.from_pretrained(plain, str(folder), adapter_name="first")
            for number, other in enumerate(more):
                model.load_adapter(str(other), adapter_name=str(number))
            names = ["first", *(str(number) for number in range(len(more)))]
            model.base_model.set_adapter(names)
            return model.eval()(ids).logits

    return made
