"""A trial at load time: does a packed step give this architecture's own result?"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from fedmira.model.base_model import BaseModel, TargetModule, find_targets
from fedmira.model.layers import find_last_layer
from fedmira.model.lora import LoraBranch, StackedAdapters, start_adapter

__all__ = ["choose_path"]

_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float16: 0.05}

_log = logging.getLogger("fedmira")
_SCALED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Settings of architectures that change the logits behind their head."""


class _Row:
    def __init__(self, prompt: list[int], response: list[int]) -> None:
        self.prompt, self.response = prompt, response


def choose_path(base: BaseModel) -> BaseModel:
    """The base with the fastest path whose losses and gradients of three short rows agree with the padded path's.

    Architectures with their own attention, positions, soft-capping or scaled logits do not agree when packed, or raise; they take
    the padded path.
    """
    config = base.model.config.get_text_config()
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _SCALED_LOGITS):
        return base
    losses, gradient = _trial(base)
    tolerance = _TOLERANCE.get(base.dtype, 2e-3)
    last = find_last_layer(base.model)
    for kernels, last_layer in dict.fromkeys(((True, last), (True, None), (False, last), (False, None))):
        packed = replace(base, packed=True, last_layer=last_layer, kernels=kernels)
        try:
            own_losses, own_gradient = _trial(packed)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError) as error:
            _log.info("%s: packed steps %s raise %s: %s", base.name, "with kernels" if kernels else "", type(error).__name__, error)
            continue
        close = torch.allclose(losses, own_losses, rtol=0, atol=tolerance)
        if close and float((gradient - own_gradient).norm()) <= tolerance * float(gradient.norm()):
            return packed
    _log.warning(
        "%s: packed steps do not agree with %s; it trains on padded batches, which is slower", base.name, type(base.model).__name__
    )
    return base


def _trial(base: BaseModel) -> tuple[Tensor, Tensor]:
    """Losses of three rows, and the gradient of an adapter, whichever path the base takes."""
    from fedmira.model.loss import response_losses

    limit = min(base.num_embeddings, len(base.tokenizer))
    draw = torch.Generator().manual_seed(0)
    head, *tails = (torch.randint(0, limit, (size,), generator=draw).tolist() for size in (9, 8, 14, 5))
    rows = [_Row(head + tail[:-3], tail[-3:]) for tail in tails]
    targets = _any_target(base)
    stacked = StackedAdapters(targets, [start_adapter(targets, 1, 0)], [1.0], base.device)
    with LoraBranch(base.model, stacked) as branch:
        (losses,) = response_losses(base, branch, [(0, rows)], 10_000)
        losses.values.sum().backward()  # type: ignore[no-untyped-call]
    return torch.cat([losses.values.detach()[losses.rows == i] for i in range(len(rows))]), stacked.gradients


def _any_target(base: BaseModel) -> list[TargetModule]:
    linear = sorted({name.rsplit(".", 1)[-1] for name, module in base.model.named_modules() if isinstance(module, torch.nn.Linear)})
    usual = [name for name in ("q_proj", "c_attn", "query_key_value") if any(path.endswith(name) for path, _ in base.model.named_modules())]
    return find_targets(base.model, [*usual, *linear][:1])
