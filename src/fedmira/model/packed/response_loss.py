"""Cross-entropy of response tokens behind a frozen head, a block of tokens at a time.

No more logits exist than a block has.

The head is frozen and every token's loss stands alone, so the gradient with respect to the hidden
states is made in the forward pass, while a block's probabilities are there, and only scaled in the
backward pass. A target is the row's own token or one that is drawn from the model itself, which is
done there too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

__all__ = ["draw_targets", "response_loss", "sampled_response_loss"]

_BLOCK_LOGITS = {"cpu": 2**22}
_BLOCK_LOGITS_ELSEWHERE = 2**26
"""Most logits of a block: 16 MiB in float32, which a processor's cache holds in part.

256 MiB on devices, which want large products.
"""


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
        return _blocked(hidden, head, targets)
    return functional.cross_entropy(head(hidden).float(), targets, reduction="none")


def sampled_response_loss(head: nn.Module, hidden: Tensor, draws: Tensor) -> Tensor:
    """Minus log probability in nats of targets drawn from the model's own probabilities.

    The draw itself carries no gradient.

    Args:
        head: the frozen output layer.
        hidden: [M, hidden].
        draws: float64 [M], uniform on [0, 1), one per token.

    Returns:
        float32 [M].
    """
    if isinstance(head, nn.Linear) and head.weight.dtype == hidden.dtype:
        return _blocked(hidden, head, draws)
    logits = head(hidden).float()
    return functional.cross_entropy(
        logits, draw_targets(logits.detach().log_softmax(dim=-1), draws), reduction="none"
    )


def draw_targets(log_probabilities: Tensor, draws: Tensor) -> Tensor:
    """The token whose stretch of the cumulated probabilities holds the draw.

    Token v with probability p_v.

    One number per token decides, so a draw depends neither on the block nor on the pass in which
    its token is computed.

    Args:
        log_probabilities: float32 [M, vocabulary].
        draws: float64 [M], uniform on [0, 1).

    Returns:
        int64 [M].
    """
    cumulated = log_probabilities.double().exp().cumsum(dim=-1)
    return torch.searchsorted(cumulated, (draws * cumulated[:, -1])[:, None], right=True)[
        :, 0
    ].clamp_(max=log_probabilities.shape[1] - 1)


def _blocked(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    result: Tensor = _BlockedLoss.apply(hidden, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
    return result


class _BlockedLoss(torch.autograd.Function):
    """Loss of `targets`: token ids, or numbers in [0, 1) by which a token is drawn."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        values = torch.empty(len(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = max(
            32, _BLOCK_LOGITS.get(hidden.device.type, _BLOCK_LOGITS_ELSEWHERE) // len(weight)
        )
        for start in range(0, len(hidden), size):
            block = slice(start, start + size)
            log_probabilities = (
                functional.linear(hidden[block], weight, bias).float().log_softmax(dim=-1)
            )
            drawn = (
                draw_targets(log_probabilities, targets[block])
                if targets.is_floating_point()
                else targets[block]
            )
            wanted = drawn[:, None]
            values[block] = -log_probabilities.gather(1, wanted)[:, 0]
            if gradient is not None:
                probabilities = log_probabilities.exp_()
                probabilities.scatter_add_(
                    1, wanted, torch.full_like(wanted, -1, dtype=torch.float32)
                )
                torch.mm(probabilities.to(weight.dtype), weight, out=gradient[block])
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (
            (gradient * grad[:, None]).to(gradient.dtype),
            None,
            None,
            None,
        )  # scaled in float32, rounded once
