"""Token ids against the embeddings of a base, before anything is trained or asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedmira.errors import ModelError
from fedmira.model.base.rows import Row
from fedmira.model.base.types import BaseModel

__all__ = ["check_ids", "check_prompt_ids"]


def check_ids(base: BaseModel, rows: Mapping[str, Iterable[Row]]) -> None:
    """Refuse rows that use a token id for which the base has no embedding.

    Args:
        rows: client id -> all its rows.
        base: the frozen base.

    Raises:
        ModelError: names the clients, their largest id and its token.
    """
    largest = {
        client: max((max((*row.prompt, *row.response)) for row in own), default=-1)
        for client, own in rows.items()
    }
    beyond = {client: top for client, top in largest.items() if top >= base.num_embeddings}
    if beyond:
        client, top = max(beyond.items(), key=lambda pair: pair[1])
        others = f" and of {len(beyond) - 1} other clients" if len(beyond) > 1 else ""
        raise ModelError(
            f"rows of client {client!r}{others} use {_token(base, top)}, but model.base "
            f"{base.name!r} has {base.num_embeddings} embeddings (ids 0 to "
            f"{base.num_embeddings - 1}); give the tokenizer that belongs to this base, or resize "
            "the base's embeddings"
        )


def check_prompt_ids(base: BaseModel, prompt: Iterable[int]) -> None:
    """Refuse a question that the base cannot read: one of its token ids, or its length.

    Args:
        base: the frozen base.
        prompt: token ids.

    Raises:
        ModelError: names the id and its token, or the lengths.
    """
    prompt = tuple(prompt)
    if base.max_positions is not None and len(prompt) >= base.max_positions:
        raise ModelError(
            f"the question has {len(prompt)} tokens with its prompt, and model.base {base.name!r} "
            f"reads at most {base.max_positions}, with the answer; shorten it, or, in a "
            "conversation, begin anew"
        )
    top = max(prompt, default=-1)
    if top >= base.num_embeddings:
        raise ModelError(
            f"the prompt uses {_token(base, top)}, but model.base {base.name!r} has "
            f"{base.num_embeddings} embeddings; ask in other words, or give the tokenizer that "
            "belongs to this base"
        )


def _token(base: BaseModel, number: int) -> str:
    """An id with its token."""
    return f"token id {number} ({base.tokenizer.convert_ids_to_tokens(number)!r})"
