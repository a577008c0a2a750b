"""What the data room needs of a tokenizer; every Hugging Face tokenizer has it."""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["Tokenizer"]


class Tokenizer(Protocol):
    """The few members that are used here.

    Attributes:
        name_or_path: how messages name the tokenizer.
        eos_token_id: the token that ends a response.
        chat_template: None when the tokenizer brings none.
    """

    name_or_path: Any
    chat_template: Any

    @property
    def eos_token_id(self) -> Any:
        """The token that ends a response, or None."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Encodes a list of texts; the result maps "input_ids" to a list of token lists."""

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Turns token ids back into text."""

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Renders a list of {"role", "content"} messages."""
