"""Greedy generation for many clients at once: every row of a batch is continued with its own client's adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from fedmira.model.base_model import BaseModel
from fedmira.model.lora import LoraBranch

__all__ = ["generate"]


def generate(
    base: BaseModel, branch: LoraBranch, prompts: Sequence[tuple[int, Sequence[int]]], max_new_tokens: int, batch_size: int = 64
) -> list[str]:
    """Continue (client, prompt token ids) pairs until the end of sequence or `max_new_tokens`; texts in the order given.

    Prompts are sorted by length so that little is padded; padding stands on the left. An answer also ends where the model's context
    ends; a prompt that fills the context loses tokens from its middle.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i][1]), i))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for index, text in zip(chosen, _batch(base, branch, [prompts[i] for i in chosen], max_new_tokens), strict=True):
            texts[index] = text
    return texts


def _batch(base: BaseModel, branch: LoraBranch, prompts: Sequence[tuple[int, Sequence[int]]], max_new_tokens: int) -> list[str]:
    padding = base.tokenizer.pad_token_id
    sequences = [_readable(base, list(ids)) for _, ids in prompts]
    size = max(map(len, sequences))
    room = max_new_tokens if base.max_positions is None else min(max_new_tokens, base.max_positions - size)
    ids = torch.tensor([[padding] * (size - len(sequence)) + sequence for sequence in sequences], device=base.device)
    seen = torch.tensor([[0] * (size - len(sequence)) + [1] * len(sequence) for sequence in sequences], device=base.device)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=room, do_sample=False, num_beams=1, pad_token_id=padding, eos_token_id=_ends(base)
    )
    with torch.no_grad(), branch.rows([client for client, _ in prompts]):
        output = base.model.generate(ids, attention_mask=seen, generation_config=settings)  # type: ignore[operator]
    texts: list[str] = base.tokenizer.batch_decode(output[:, size:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _readable(base: BaseModel, ids: list[int]) -> list[int]:
    """A prompt that leaves the context room for an answer: a longer one loses tokens from its middle, as in training."""
    if base.max_positions is None or len(ids) < base.max_positions:
        return ids
    kept = base.max_positions - base.max_positions // 4
    return ids[: kept - kept // 4] + ids[len(ids) - kept // 4 :]


def _ends(base: BaseModel) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those the checkpoint names."""
    named = base.model.generation_config.eos_token_id
    listed = named if isinstance(named, list) else [] if named is None else [named]
    return sorted({base.tokenizer.eos_token_id, *listed})
