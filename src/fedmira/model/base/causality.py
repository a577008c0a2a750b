"""A trial at load time: does a base read each token without those that follow?"""

from __future__ import annotations

import torch

from fedmira.errors import ModelError
from fedmira.model.base.memory import out_of_memory
from fedmira.model.base.types import BaseModel

__all__ = ["UNFIT", "check_causal"]

UNFIT = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError)
"""What architectures raise in passes that are not made for them."""
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
_LENGTH, _CHANGED = 12, 3


def check_causal(base: BaseModel) -> None:
    """Refuse a base whose logits at a place change with later tokens.

    Its losses are no next-token losses.

    Raises:
        ModelError: they do, or the forward pass fails.
    """
    limit = min(base.num_embeddings, len(base.tokenizer))
    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(0, limit, (_LENGTH,), generator=draw)
    other = ids.clone()
    other[-_CHANGED:] = (other[-_CHANGED:] + 1 + limit // 2) % limit
    try:
        with torch.no_grad():
            first, second = (
                base.model(input_ids=row[None].to(base.device), use_cache=False).logits[
                    0, : _LENGTH - _CHANGED
                ]
                for row in (ids, other)
            )
    except UNFIT as error:
        if out_of_memory(error):
            raise ModelError(_out_of_memory(base)) from error
        raise ModelError(
            f"model.base {base.name!r}: a trial pass of {type(base.model).__name__} ends in "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'}; "
            "this architecture cannot be trained here, take another model.base"
        ) from error
    first, second = first.float(), second.float()
    if not bool(first.isfinite().all()):
        raise ModelError(
            f"model.base {base.name!r}: its logits are not finite in "
            f"{str(base.dtype).removeprefix('torch.')}; "
            + ("" if base.dtype is torch.float32 else "set model.dtype to 'float32', or ")
            + "take another model.base"
        )
    if (first - second).norm() > _ROUNDING.get(base.dtype, 1e-4) * first.norm():
        raise ModelError(
            f"model.base {base.name!r}: {type(base.model).__name__} is not causal"
            f"{_reason(base)}: what it says at a place changes with later tokens, so it cannot be "
            "trained on next tokens here; take a decoder as model.base"
        )


def _reason(base: BaseModel) -> str:
    """The setting in config.json that makes it so, where there is one."""
    config = base.model.config.get_text_config()
    if getattr(config, "is_causal", None) is False:
        return " (is_causal is false in its config.json)"
    if getattr(config, "is_decoder", None) is False:
        return " (is_decoder is false in its config.json)"
    return ""


def _out_of_memory(base: BaseModel) -> str:
    return (
        f"model.base {base.name!r}: out of memory on {base.device} beside its "
        f"{base.num_parameters:,} parameters, before anything was trained; free memory there, "
        "take a smaller model.base, or set model.dtype or model.quantization"
    )
