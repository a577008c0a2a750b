"""A trial at first use: does decoding from the cache give this architecture's own result?"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import PreTrainedModel

from fedmira.model.base_model import BaseModel
from fedmira.model.decoding import WaveDecoder, rectangle
from fedmira.model.lora import LoraBranch
from fedmira.model.waves import Block, Prompt, PromptGroup, Wave

__all__ = ["decoding_agrees"]

_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
_agreed: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def decoding_agrees(base: BaseModel, branch: LoraBranch) -> bool:
    """Whether prompts read packed and tokens read one by one from the cache give the losses of plain passes; tried once per model.

    Architectures whose attention keeps more than keys and values, or shares them between layers, do not, or raise.
    """
    if base.model not in _agreed:
        limit = min(base.num_embeddings, len(base.tokenizer))
        draw = torch.Generator().manual_seed(1)
        head, *tails, last = (torch.randint(0, limit, (size,), generator=draw).tolist() for size in (9, 3, 8, 5, 11))
        asked = enumerate((*((*head, *tail) for tail in sorted(tails, key=len, reverse=True)), tuple(last)))
        prompts = [Prompt(i, 0, ids[:-1], ids[-1:], 4) for i, ids in asked]
        following = torch.randint(0, limit, (len(prompts), 4), generator=draw)
        groups = [PromptGroup(0, tuple(prompts[:2]), len(head)), *(PromptGroup(0, (prompt,), 2) for prompt in prompts[2:])]
        wave = Wave((Block(tuple(groups[:2])), Block(tuple(groups[2:]))))
        try:
            own = _forced_losses(base, branch, wave, following)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError):
            _agreed[base.model] = False
        else:
            plain = torch.stack([_plain_losses(base, branch, prompt, row) for prompt, row in zip(prompts, following, strict=True)])
            _agreed[base.model] = bool(torch.allclose(own, plain, rtol=0, atol=_TOLERANCE.get(base.dtype, 2e-3)))
    return _agreed[base.model]


def _forced_losses(base: BaseModel, branch: LoraBranch, wave: Wave, following: Tensor) -> Tensor:
    """Losses [prompts, tokens] of given continuations, one token of each prompt at a time."""
    decoder = WaveDecoder(base, wave)
    rows = [(number, row) for number, group in enumerate(wave.groups) for row in range(len(group.prompts))]
    at = torch.tensor(rows, device=base.device).unbind(1)
    following = following.to(base.device)
    tokens = rectangle(wave, [[prompt.response[0] for prompt in group.prompts] for group in wave.groups], base.device)
    head = base.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    losses: list[Tensor] = []
    decoder.read(branch, 10_000)
    with decoder.attached(), branch.rows(decoder.clients):
        for token in following.T:
            logits = head(decoder.step(tokens))[at].float()
            losses.append(functional.cross_entropy(logits, token, reduction="none"))
            tokens[at] = token
    return torch.stack(losses, dim=1)


def _plain_losses(base: BaseModel, branch: LoraBranch, prompt: Prompt, following: Tensor) -> Tensor:
    read = len(prompt.prompt)
    ids = torch.tensor([*prompt.prompt, *prompt.response, *following.tolist()], device=base.device)
    with branch.tokens([(0, slice(None))]):
        logits = base.model(input_ids=ids[None], use_cache=False).logits[0, read:-1]
    return functional.cross_entropy(logits.float(), ids[read + 1 :], reduction="none")
