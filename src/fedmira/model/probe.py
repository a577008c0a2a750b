"""A trial at load time: does a packed step give this architecture's own result?"""

from __future__ import annotations

import torch

from fedmira.model.base_model import BaseModel, TargetModule, find_targets
from fedmira.model.lora import LoraBranch, StackedAdapters, start_adapter

__all__ = ["packed_agrees"]

_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float16: 0.05}

_SCALED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Settings of architectures that change the logits behind their head."""


class _Row:
    def __init__(self, prompt: list[int], response: list[int]) -> None:
        self.prompt, self.response = prompt, response


def packed_agrees(base: BaseModel) -> bool:
    """Whether packed and padded losses of three short rows agree token by token.

    Architectures with their own attention, positions, soft-capping or scaled logits do not, or raise; they take the padded path.
    """
    from fedmira.model.loss import _packed, _padded

    config = base.model.config.get_text_config()
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _SCALED_LOGITS):
        return False
    limit = min(base.num_embeddings, len(base.tokenizer))
    draw = torch.Generator().manual_seed(0)
    head, *tails = (torch.randint(0, limit, (size,), generator=draw).tolist() for size in (9, 8, 14, 5))
    rows = [_Row(head + tail[:-3], tail[-3:]) for tail in tails]
    targets = _any_target(base)
    stacked = StackedAdapters(targets, [start_adapter(targets, 1, 0)], [1.0], base.device)
    with torch.no_grad(), LoraBranch(base.model, stacked) as branch:
        (padded,) = _padded(base, branch, [(0, rows)], 10_000)
        try:
            (packed,) = _packed(base, branch, [(0, rows)], 10_000)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError):
            return False
    by_row = [torch.cat([losses.values[losses.rows == i] for i in range(len(rows))]) for losses in (padded, packed)]
    left, right = by_row
    return left.shape == right.shape and bool(torch.allclose(left, right, rtol=0, atol=_TOLERANCE.get(base.dtype, 2e-3)))


def _any_target(base: BaseModel) -> list[TargetModule]:
    linear = sorted({name.rsplit(".", 1)[-1] for name, module in base.model.named_modules() if isinstance(module, torch.nn.Linear)})
    usual = [name for name in ("q_proj", "c_attn", "query_key_value") if any(path.endswith(name) for path, _ in base.model.named_modules())]
    return find_targets(base.model, [*usual, *linear][:1])
