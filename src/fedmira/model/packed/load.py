"""A base that is ready to train on: loaded, frozen, and probed for its fastest path."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmira.config import ModelSettings
from fedmira.model.base.causality import check_causal
from fedmira.model.base.loading import freeze, read_base
from fedmira.model.base.types import BaseModel
from fedmira.model.packed.probe import choose_path

__all__ = ["from_model", "load_base"]


def load_base(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerBase | None = None
) -> BaseModel:
    """Load the base model, frozen and in eval mode, and probe whether packed steps agree with it.

    Args:
        settings: the [model] section.
        tokenizer: what `load_tokenizer` gave for these settings, where it was loaded already.

    Raises:
        ModelError: it cannot be loaded, is not what its files say, is not causal, or the device is
            not there.
    """
    return _tried(read_base(settings, tokenizer))


def from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    location: str = "",
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> BaseModel:
    """Freeze a model in memory, wrap it, and probe whether packed steps agree with it.

    Args:
        model: it is changed in place: eval mode, no gradients, greedy generation.
        tokenizer: of the same vocabulary, with a padding token.
        name: what messages and run.json call it.
        location: the folder or hub id it came from; "" where there is none.
        dtype, device: where it shall compute; None leaves it as it is.

    Raises:
        ModelError: a weight is no finite number, the model is not causal, or it has no embedding
            for the token that ends a response.
    """
    return _tried(freeze(model, tokenizer, name, location, dtype, device))


def _tried(base: BaseModel) -> BaseModel:
    check_causal(base)
    return choose_path(base)
