"""A model that belongs to somebody else: used as a base, and given back as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmira.errors import ModelError

__all__ = ["borrowed", "with_padding"]


@contextmanager
def borrowed(model: PreTrainedModel) -> Iterator[None]:
    """Gives a model back as it was at the beginning of the block.

    Within it the model is frozen and generates greedily. Its weights are never changed, and neither
    are their number type and their device.

    Args:
        model: of its owner.
    """
    training = {name: module.training for name, module in model.named_modules()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    generation = model.generation_config
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
        for parameter, was in zip(model.parameters(), trained, strict=True):
            parameter.requires_grad_(was)
        model.generation_config = generation


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy that pads with the end-of-sequence token where it has no other.

    Args:
        tokenizer: of its owner; it is not changed.

    Raises:
        ModelError: it has no end-of-sequence token, so that a response could never end.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "base: the tokenizer has no end-of-sequence token, so a response could never "
            "end; set its eos_token"
        )
    if tokenizer.pad_token_id is not None:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.eos_token
    return own
