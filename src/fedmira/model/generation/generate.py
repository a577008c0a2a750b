"""Greedy generation for many clients at once.

Every row of a batch is continued with its own client's adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby

import torch
from torch import Tensor
from transformers import GenerationConfig

from fedmira.data import answer_text, turn_ends, without_middle
from fedmira.model.base.memory import free_bytes
from fedmira.model.base.types import BaseModel
from fedmira.model.generation.decoding import WaveDecoder, rectangle
from fedmira.model.generation.probe import decoding_agrees, padding_agrees
from fedmira.model.generation.waves import (
    CacheShape,
    Prompt,
    Wave,
    plan_waves,
)
from fedmira.model.lora.branch import LoraBranch

__all__ = [
    "answered",
    "choose_decoding",
    "end_tokens",
    "fit_prompts",
    "generate",
    "generate_tokens",
    "most_cache_bytes",
    "texts_of",
]

_CPU_CACHE = 2**28
_FREE_SHARE = 4
_LOOK_EVERY = 4
_SHRINK = 0.75
_PADDED_ROWS = 64


def generate(
    base: BaseModel,
    branch: LoraBranch,
    prompts: Sequence[tuple[int, Sequence[int]]],
    max_new_tokens: int,
    budget: int = 2048,
    cache_bytes: int | None = None,
) -> list[str]:
    """The texts of `generate_tokens`, as `texts_of` reads them.

    Args:
        base: the frozen base.
        branch: the adapters of the clients, as they are hooked into the layers.
        prompts: (client index, token ids) pairs.
        max_new_tokens: most tokens of an answer.
        budget: most tokens in a forward pass.
        cache_bytes: most bytes of the cache; None measures what is free.
    """
    return texts_of(
        base, generate_tokens(base, branch, prompts, max_new_tokens, budget, cache_bytes)
    )


def generate_tokens(
    base: BaseModel,
    branch: LoraBranch,
    prompts: Sequence[tuple[int, Sequence[int]]],
    max_new_tokens: int,
    budget: int = 2048,
    cache_bytes: int | None = None,
) -> list[list[int]]:
    """Continue (client, prompt token ids) pairs greedily.

    Each ends with the end of sequence or after `max_new_tokens`.

    An answer also ends where the model's context ends; a prompt that fills the context loses tokens
    from its middle. What a prompt is answered does not depend, but for float rounding, on what else
    is asked.

    Args:
        branch: entered by the caller.
        budget: most prompt tokens read in one pass.
        cache_bytes: most bytes of keys, values and scores held at once (a single prompt always
            fits); None is 256 MiB on a CPU and a quarter of the free memory on CUDA.
        base: the frozen base.
        prompts: (client index, token ids) pairs.
        max_new_tokens: most tokens of an answer.

    Returns:
        The new tokens of each prompt in the order given, without the one that ended it.
    """
    asked = fit_prompts(base, prompts, max_new_tokens)
    if not asked:
        return []
    with torch.no_grad():
        if choose_decoding(base, branch):
            waves = plan_waves(
                asked,
                _cache_shape(base),
                most_cache_bytes(base.device) if cache_bytes is None else cache_bytes,
            )
            found = [pair for wave in waves for pair in _continue(base, branch, wave, budget)]
        else:
            found = [
                pair
                for chosen in _padded_batches(asked, budget, padding_agrees(base, branch, _padded))
                for pair in _padded(base, branch, chosen)
            ]
    return answered(base, found)


def choose_decoding(base: BaseModel, branch: LoraBranch) -> bool:
    """Whether answers are continued from the cache of waves, which a trial decides at first use.

    Args:
        base: the frozen base.
        branch: entered by the caller.
    """
    with torch.no_grad():
        waves = base.packed and decoding_agrees(base, branch)
        if not waves:
            padding_agrees(base, branch, _padded)
    return waves


def answered(base: BaseModel, found: Sequence[tuple[Prompt, Sequence[int]]]) -> list[list[int]]:
    """The new tokens of each prompt, in the order in which the prompts were asked.

    They go up to its end of sequence and its limit.

    Args:
        base: gives the tokens that end an answer.
        found: prompts with their new tokens, in any order.
    """
    ends = set(end_tokens(base))
    answers: list[list[int]] = [[]] * len(found)
    for prompt, tokens in found:
        stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        answers[prompt.index] = list(tokens[: min(stop, prompt.limit)])
    return answers


def texts_of(base: BaseModel, answers: list[list[int]]) -> list[str]:
    """Tokens as texts, as `answer_text` reads them.

    Args:
        base: the frozen base.
        answers: new token ids of each prompt.
    """
    ends = end_tokens(base)
    return [answer_text(base.tokenizer, answer, ends) for answer in answers]


def _continue(
    base: BaseModel, branch: LoraBranch, wave: Wave, budget: int
) -> Iterator[tuple[Prompt, list[int]]]:
    """The new tokens of a wave; what stands behind an end of sequence is meaningless."""
    decoder, size = WaveDecoder(base, wave), wave.size
    head = base.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    ends = torch.tensor(end_tokens(base), device=base.device)
    limits = rectangle(
        wave, [[prompt.limit for prompt in group.prompts] for group in wave.groups], base.device
    )
    tokens = rectangle(
        wave,
        [[prompt.response[0] for prompt in group.prompts] for group in wave.groups],
        base.device,
    )
    done = limits < 1
    answers = torch.zeros(done.numel(), size.limit, dtype=torch.long, device=base.device)
    decoder.read(branch, budget)
    with decoder.attached(), ExitStack() as factors:
        factors.enter_context(branch.rows(decoder.clients))
        for count in range(1, size.limit + 1):
            tokens = head(decoder.step(tokens)).argmax(dim=-1)
            answers[decoder.places, count - 1] = tokens
            done |= torch.isin(tokens, ends) | (limits <= count)
            kept = _survivors(done) if count % _LOOK_EVERY == 0 else None
            if kept is None:
                continue
            groups, rows = kept
            if not len(groups):
                break
            tokens, done, limits = (
                tensor[groups[:, None], rows] for tensor in (tokens, done, limits)
            )
            decoder.keep(groups, rows)
            factors.close()
            factors.enter_context(branch.rows(decoder.clients))
    for group, found in zip(
        wave.groups, answers.view(size.groups, size.rows, -1).tolist(), strict=True
    ):
        yield from zip(group.prompts, found, strict=False)


def _survivors(done: Tensor) -> tuple[Tensor, Tensor] | None:
    """Groups [g] with unfinished rows and a rectangle [g, r] of their rows.

    Only where that is clearly smaller than `done` [G, R].

    Looking waits for the device, so it is done every few steps only.
    """
    counts = (~done).sum(dim=1)
    groups, rows = counts.nonzero()[:, 0], int(counts.max())
    if len(groups) * rows > _SHRINK * done.numel():
        return None
    return groups, done[groups].long().argsort(dim=1, stable=True)[:, :rows]


def _padded_batches(
    prompts: Sequence[Prompt], budget: int, mixed: bool = True
) -> Iterator[list[Prompt]]:
    """Prompts of like length, as many as fit `budget` tokens but at most 64.

    Those for which the context leaves less room than the others share it only with their equals.

    Args:
        mixed: whether prompts of different lengths may stand in one batch, padded; if not, those of
            a batch have the same length.
    """
    order = sorted(prompts, key=lambda prompt: (-len(prompt.prompt), prompt.index))

    def kind_of(prompt: Prompt) -> tuple[int, int]:
        return prompt.limit, 0 if mixed else len(prompt.prompt)

    for _, equals in groupby(order, key=kind_of):
        waiting = list(equals)
        while waiting:
            at_once = max(1, min(_PADDED_ROWS, budget // (len(waiting[0].prompt) + 1)))
            yield waiting[:at_once]
            waiting = waiting[at_once:]


def _padded(
    base: BaseModel, branch: LoraBranch, prompts: Sequence[Prompt]
) -> Iterator[tuple[Prompt, list[int]]]:
    """The plain path: prompts padded on the left, and transformers' own loop."""
    padding = base.tokenizer.pad_token_id
    sequences = [[*prompt.prompt, *prompt.response] for prompt in prompts]
    size = max(map(len, sequences))
    ids = torch.tensor(
        [[padding] * (size - len(sequence)) + sequence for sequence in sequences],
        device=base.device,
    )
    seen = torch.tensor(
        [[0] * (size - len(sequence)) + [1] * len(sequence) for sequence in sequences],
        device=base.device,
    )
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=prompts[0].limit,
        do_sample=False,
        num_beams=1,
        pad_token_id=padding,
        eos_token_id=end_tokens(base),
    )
    with branch.rows([prompt.client for prompt in prompts]):
        output = base.model.generate(ids, attention_mask=seen, generation_config=settings)  # type: ignore[operator]
    yield from zip(prompts, output[:, size:].tolist(), strict=True)


def fit_prompts(
    base: BaseModel,
    prompts: Sequence[tuple[int, Sequence[int]]],
    max_new_tokens: int,
    extra: int = 0,
) -> list[Prompt]:
    """Prompts that leave the context room for an answer.

    Longer ones lose tokens from their middle, as in training.

    Args:
        prompts: (client, token ids) each.
        max_new_tokens: most tokens of an answer; fewer where the context ends before.
        extra: positions of the context that something else takes, in front of every prompt.
        base: gives the length of the context.
    """
    most = None if base.max_positions is None else base.max_positions - extra
    return [
        _fitted(most, index, client, tuple(ids), max_new_tokens)
        for index, (client, ids) in enumerate(prompts)
    ]


def _fitted(most: int | None, index: int, client: int, ids: tuple[int, ...], limit: int) -> Prompt:
    if most is not None:
        if len(ids) >= most:
            ids = without_middle(ids, most - most // 4)
        limit = min(limit, most - len(ids))
    return Prompt(index, client, ids[:-1], ids[-1:], limit)


def end_tokens(base: BaseModel) -> list[int]:
    """Tokens that end an answer.

    The tokenizer's, those the checkpoint names, and the one with which the chat template ends a
    turn.
    """
    named = base.model.generation_config.eos_token_id
    listed = named if isinstance(named, list) else [] if named is None else [named]
    return sorted({base.tokenizer.eos_token_id, *listed, *turn_ends(base.tokenizer)})


def _cache_shape(base: BaseModel) -> CacheShape:
    config = base.model.config.get_text_config()
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return CacheShape(
        2 * config.num_hidden_layers * key_heads * width * base.dtype.itemsize,
        base.num_embeddings * base.dtype.itemsize,
    )


def most_cache_bytes(device: torch.device) -> int:
    """What generation takes for keys, values and scores unless it is told.

    256 MiB, on CUDA a quarter of the free memory.
    """
    return int(free_bytes(device)) // _FREE_SHARE if device.type == "cuda" else _CPU_CACHE
