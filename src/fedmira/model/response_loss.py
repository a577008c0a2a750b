"""Cross-entropy of response tokens behind a frozen head, a block of tokens at a time: no more logits exist than a block has.

The head is frozen and every token's loss stands alone, so the gradient with respect to the hidden states is made in the forward
pass, while a block's probabilities are there, and only scaled in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

__all__ = ["response_loss"]

_BLOCK_LOGITS = 2**22
"""Most logits of a block: 16 MiB in float32."""


def response_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Minus log probability of each target in nats.

    Args:
        head: the frozen output layer.
        hidden: [M, hidden].
        targets: int64 [M].

    Returns:
        float32 [M].
    """
    if isinstance(head, nn.Linear) and head.weight.dtype == hidden.dtype:
        result: Tensor = _BlockedLoss.apply(hidden, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
        return result
    return functional.cross_entropy(head(hidden).float(), targets, reduction="none")


class _BlockedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        values = torch.empty(len(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = max(32, _BLOCK_LOGITS // len(weight))
        for start in range(0, len(hidden), size):
            block = slice(start, start + size)
            wanted = targets[block, None]
            log_probabilities = functional.linear(hidden[block], weight, bias).float().log_softmax(dim=-1)
            values[block] = -log_probabilities.gather(1, wanted)[:, 0]
            if gradient is not None:
                probabilities = log_probabilities.exp_()
                probabilities.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=torch.float32))
                torch.mm(probabilities.to(weight.dtype), weight, out=gradient[block])
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None].to(gradient.dtype), None, None, None
