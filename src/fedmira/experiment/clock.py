"""The time that chat templates are told: one for a whole run."""

from __future__ import annotations

from fedmira.config import Config
from fedmira.data import Tokenizer, clock_now, uses_clock

__all__ = ["with_clock"]


def with_clock(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with the present time for the chat template, where it asks for one.

    Args:
        config: stays as it is; a time that it sets is kept.
        tokenizer: that of the base.
    """
    data = config.data
    if data.prompt != "chat" or data.clock or not uses_clock(tokenizer):
        return config
    return config.model_copy(update={"data": data.model_copy(update={"clock": clock_now()})})
