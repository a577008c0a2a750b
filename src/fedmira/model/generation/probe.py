"""A trial at first use: does decoding from the cache give this architecture's own result?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import PreTrainedModel

from fedmira.adapters import Adapter
from fedmira.model.base.memory import out_of_memory
from fedmira.model.base.types import BaseModel, TargetModule
from fedmira.model.generation.decoding import WaveDecoder, rectangle
from fedmira.model.generation.waves import (
    Block,
    Prompt,
    PromptGroup,
    Wave,
)
from fedmira.model.lora.branch import LoraBranch
from fedmira.model.lora.stack import StackedAdapters, start_adapter
from fedmira.model.packed.probe import UNFIT, losses_agree

__all__ = ["decoding_agrees", "padding_agrees"]

_log = logging.getLogger("fedmira")
_agreed: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
_padded: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@contextmanager
def _own_adapter(base: BaseModel, branch: LoraBranch) -> Iterator[LoraBranch]:
    """An adapter of the trial's own in place of the clients', so that none of theirs decides."""
    targets = branch.adapters.targets
    stacked = StackedAdapters(targets, [_adapter(targets)], [1.0], base.device, trainable=False)
    with torch.no_grad(), branch.aside(), LoraBranch(base.model, stacked) as own:
        yield own


def decoding_agrees(base: BaseModel, branch: LoraBranch) -> bool:
    """Whether reading from the cache gives the losses of plain passes; tried once per model.

    Prompts are read packed and tokens one by one.

    Architectures whose attention keeps more than keys and values, or shares them between layers, do
    not, or raise. The trial has an adapter of its own, so that no client's adapter decides.

    Args:
        branch: entered by the caller; its layers carry the trial's adapter.
        base: the frozen base.
    """
    if base.model not in _agreed:
        with _own_adapter(base, branch) as own:
            reason = _difference(base, own)
        _agreed[base.model] = reason is None
        if reason is not None:
            _log.warning(
                "%s: decoding from the cache %s; it answers by transformers' own loop, "
                "which is slower",
                base.name,
                reason,
            )
    return _agreed[base.model]


def padding_agrees(
    base: BaseModel,
    branch: LoraBranch,
    answer: Callable[[BaseModel, LoraBranch, Sequence[Prompt]], Iterable[tuple[Prompt, list[int]]]],
) -> bool:
    """Whether short prompts padded on the left beside a long one get the answers they get alone.

    Tried once per model.

    Architectures that carry a state from token to token may read the padding too.

    Args:
        branch: entered by the caller; its layers carry the trial's adapter.
        answer: continues prompts in one padded batch.
        base: the frozen base.
    """
    if base.model not in _padded:
        with _own_adapter(base, branch) as own:
            _padded[base.model] = _padding_changes_nothing(base, own, answer)
        if not _padded[base.model]:
            _log.warning(
                "%s: answers of %s depend on padding; prompts of one length are answered together "
                "and none is padded, which is slower",
                base.name,
                type(base.model).__name__,
            )
    return _padded[base.model]


def _padding_changes_nothing(
    base: BaseModel,
    branch: LoraBranch,
    answer: Callable[[BaseModel, LoraBranch, Sequence[Prompt]], Iterable[tuple[Prompt, list[int]]]],
) -> bool:
    """Whether each step's logits agree, alone and padded, while the same tokens were read."""
    limit = min(base.num_embeddings, len(base.tokenizer))
    draw = torch.Generator().manual_seed(5)
    drawn = [torch.randint(0, limit, (size,), generator=draw).tolist() for size in (3, 6, 17)]
    prompts = [Prompt(i, 0, tuple(ids[:-1]), tuple(ids[-1:]), 4) for i, ids in enumerate(drawn)]
    steps: list[Tensor] = []

    def keep(module: object, arguments: object, output: Any) -> None:
        steps.append(output.logits[:, -1].float())

    handle = base.model.register_forward_hook(keep)
    try:
        together = [tokens for _, tokens in answer(base, branch, prompts)]
        padded = tuple(steps)
        for number, prompt in enumerate(prompts):
            steps.clear()
            ((_, alone),) = answer(base, branch, [prompt])
            for step, (beside, single) in enumerate(zip(padded, steps, strict=False)):
                if alone[:step] != together[number][:step]:
                    break  # a tie that rounding decides
                if not losses_agree(beside[number], single[0], base.dtype):
                    return False
    finally:
        handle.remove()
    return True


def _adapter(targets: Sequence[TargetModule]) -> Adapter:
    """An adapter whose both factors are drawn, so that it changes what the layers give."""
    draw = torch.Generator().manual_seed(2)
    start = start_adapter(targets, 2, 2)
    return {
        name: tensor if tensor.any() else 0.02 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in start.items()
    }


def _difference(base: BaseModel, branch: LoraBranch) -> str | None:
    """What is wrong with decoding from the cache, or None."""
    limit = min(base.num_embeddings, len(base.tokenizer))
    draw = torch.Generator().manual_seed(1)
    head, *tails, last = (
        torch.randint(0, limit, (size,), generator=draw).tolist() for size in (9, 3, 8, 5, 11)
    )
    asked = enumerate(
        (*((*head, *tail) for tail in sorted(tails, key=len, reverse=True)), tuple(last))
    )
    prompts = [Prompt(i, 0, ids[:-1], ids[-1:], 4) for i, ids in asked]
    following = torch.randint(0, limit, (len(prompts), 4), generator=draw)
    groups = [
        PromptGroup(0, tuple(prompts[:2]), len(head)),
        *(PromptGroup(0, (prompt,), 2) for prompt in prompts[2:]),
    ]
    wave = Wave((Block(tuple(groups[:2])), Block(tuple(groups[2:]))))
    try:
        found = _forced_losses(base, branch, wave, following)
    except UNFIT as error:
        if out_of_memory(error):
            raise  # says nothing about the architecture
        return f"raises {type(error).__name__}: {error}"
    plain = torch.stack(
        [
            _plain_losses(base, branch, prompt, row)
            for prompt, row in zip(prompts, following, strict=True)
        ]
    )
    return (
        None
        if losses_agree(found, plain, base.dtype)
        else f"does not agree with {type(base.model).__name__}"
    )


def _forced_losses(base: BaseModel, branch: LoraBranch, wave: Wave, following: Tensor) -> Tensor:
    """Losses [prompts, tokens] of given continuations, one token of each prompt at a time."""
    decoder = WaveDecoder(base, wave)
    rows = [
        (number, row)
        for number, group in enumerate(wave.groups)
        for row in range(len(group.prompts))
    ]
    at = torch.tensor(rows, device=base.device).unbind(1)
    following = following.to(base.device)
    tokens = rectangle(
        wave,
        [[prompt.response[0] for prompt in group.prompts] for group in wave.groups],
        base.device,
    )
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
