"""Where an answer ends, and what its tokens say."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from fedmira.data.rendering import ChatTemplate
from fedmira.data.tokenizer import Tokenizer
from fedmira.errors import DataError

__all__ = ["answer_text", "turn_ends"]

# Some templates write this in front of every answer that came without thoughts.
_NO_THOUGHT = re.compile(r"\s*<think>\s*</think>")


def turn_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end a turn of the assistant in the tokenizer's chat template.

    Empty where it has no template, or one that ends turns with ordinary text.
    """
    if tokenizer.chat_template is None:
        return frozenset()
    try:
        end = ChatTemplate(tokenizer).turn_end
    except DataError:
        return frozenset()  # it is refused, with its reason, where it is asked for
    return frozenset() if end is None else frozenset({end})


def answer_text(tokenizer: Tokenizer, ids: Sequence[int], ends: Collection[int]) -> str:
    """The text of an answer up to its end, without surrounding blanks.

    Only padding and a start of sequence are left out: other special tokens may be the answer. An
    empty block of thoughts that a template puts in front of answers is no part of it.

    Args:
        tokenizer: that made the ids.
        ids: of the answer.
        ends: ids that end it.
    """
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    silent = {
        getattr(tokenizer, "pad_token_id", None),
        getattr(tokenizer, "bos_token_id", None),
    } - {None}
    kept = [token for token in ids[:stop] if token not in silent]
    text = str(tokenizer.decode(kept, skip_special_tokens=False)).strip()
    return _NO_THOUGHT.sub("", text, count=1).strip() if text.startswith("<think>") else text
