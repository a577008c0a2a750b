"""A trial at load time: does a packed step give this architecture's own result?"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedmira.errors import ModelError
from fedmira.model.base.causality import UNFIT
from fedmira.model.base.files import listed
from fedmira.model.base.layers import find_last_layer
from fedmira.model.base.memory import out_of_memory
from fedmira.model.base.targets import find_targets
from fedmira.model.base.types import BaseModel, TargetModule
from fedmira.model.lora.branch import LoraBranch
from fedmira.model.lora.stack import StackedAdapters, adapter_names, start_adapter
from fedmira.model.packed.attention import attention_ways, layers_seen
from fedmira.model.packed.varlen import why_not

__all__ = ["UNFIT", "choose_path", "losses_agree", "targets_in_use"]

_OF_LOSSES = {torch.float32: 2e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
_OF_GRADIENT = {torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""How far two ways may differ, as a share of the norm.

In bfloat16 trained models were seen to differ from themselves, padded and packed, by 0.006 in
losses and 0.04 in the gradient; what a wrong mask does to the gradient is far more.
"""

_LOST = {
    ("joined", "copied"): "joined attention",
    ("joined", "rows"): "attention kernels",
    ("copied", "rows"): "attention kernels",
    ("blocks", "rows"): "attention kernels",
}
"""What is missing on the way from the fastest attention to another."""

_log = logging.getLogger("fedmira")
_SCALED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Settings of architectures that change the logits behind their head."""


class _Row:
    def __init__(self, prompt: list[int], response: list[int]) -> None:
        self.prompt, self.response = prompt, response


def choose_path(base: BaseModel) -> BaseModel:
    """The base with the fastest path that agrees with the padded path.

    Losses and gradients of three short rows are compared.

    Architectures with their own attention, positions, soft-capping or scaled logits do not agree
    when packed, or raise; they take the padded path. What is lost on the way is logged.

    Raises:
        ModelError: memory runs out, which says nothing about any path.
    """
    config = base.model.config.get_text_config()
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _SCALED_LOGITS):
        return base
    try:
        return _fastest(base)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise ModelError(
            f"model.base {base.name!r}: out of memory on {base.device} beside its "
            f"{base.num_parameters:,} parameters, before anything was "
            "trained; free memory there, take a smaller model.base, or set model.dtype or "
            "model.quantization"
        ) from error


def _fastest(base: BaseModel) -> BaseModel:
    try:
        targets = _any_target(base)
        losses, stacked = _trial(base, targets)
    except UNFIT as error:
        if out_of_memory(error):
            raise
        raise ModelError(
            f"model.base {base.name!r}: a trial step of {type(base.model).__name__} ends "
            f"in {type(error).__name__}: {error}; this "
            "architecture cannot be trained here, take another model.base"
        ) from error
    last = find_last_layer(base.model)
    ways = attention_ways(base.device, base.dtype)
    for way, last_layer in [(way, layer) for way in ways for layer in dict.fromkeys((last, None))]:
        packed = replace(base, packed=True, last_layer=last_layer, attention=way)
        lost = [
            what
            for what, there in (
                (_LOST[ways[0], way] if way != ways[0] else "", way == ways[0]),
                ("a shortened last layer", last_layer is last),
            )
            if not there
        ]
        try:
            with layers_seen() as attending:
                own_losses, own = _trial(packed, targets)
        except UNFIT as error:
            if out_of_memory(error):
                raise
            without = f" without {' and '.join(lost)}" if lost else ""
            _log.info(
                "%s: packed steps%s raise %s: %s", base.name, without, type(error).__name__, error
            )
            continue
        layers = getattr(base.model.config.get_text_config(), "num_hidden_layers", 0)
        if len(attending) < layers:
            break  # rows would be read on into each other, be it ever so faintly in a trial
        if losses_agree(own_losses, losses, base.dtype) and _near(
            own.gradients, stacked.gradients, _OF_GRADIENT.get(base.dtype, 2e-3)
        ):
            if lost:
                _log.warning(
                    "%s: packed steps agree only without %s, which is slower",
                    base.name,
                    " and ".join(lost),
                )
            return _attending(packed, attending)
    _log.warning(
        "%s: packed steps do not agree with %s; it trains on padded batches, which is slower",
        base.name,
        type(base.model).__name__,
    )
    return base


def _attending(base: BaseModel, seen: Mapping[int, tuple[bool, str]]) -> BaseModel:
    """The base with the ways that its layers' attention has taken.

    A call for each row is what a GPU spends its time with, so it is warned of there.
    """
    whole, windowed = (
        {way for window, way in seen.values() if window is with_window}
        for with_window in (False, True)
    )
    # Layers whose values have other sizes than their keys go by row, whatever was wanted.
    found = replace(
        base,
        attention="rows" if "rows" in whole else base.attention,
        attention_in_windows=next(iter(sorted(windowed, reverse=True)), ""),
    )
    if base.device.type != "cpu" and "rows" in whole | windowed:
        _log.warning(
            "%s: attention runs as a call for each row, and launches grow with the rows, which is "
            "slow on %s: variable-length attention is not used, as %s",
            base.name,
            base.device,
            why_not(base.device, base.dtype) or "it does not agree with this architecture's own",
        )
    return found


def losses_agree(own: Tensor, plain: Tensor, dtype: torch.dtype) -> bool:
    """Whether losses of equal tokens, made in two ways, are the same but for rounding.

    The rounding is that of the base's number type.

    Args:
        own: losses of packed passes.
        plain: losses of plain passes, of the same shape.
        dtype: that the base computes in.
    """
    return _near(own, plain, _OF_LOSSES.get(dtype, 2e-4))


def _near(own: Tensor, plain: Tensor, share: float) -> bool:
    return bool((own - plain).norm() <= share * plain.norm())


def targets_in_use(base: BaseModel, targets: Sequence[TargetModule]) -> list[TargetModule]:
    """The targets that text trains: those whose layer gets a gradient from three short rows.

    Layers of experts are chosen by few tokens each, so those of one name are judged together.

    Args:
        base: the frozen base.
        targets: the linear layers that carry adapters, in the model's order.

    Raises:
        ModelError: none of them gets one, or the trial fails.
    """
    try:
        _, stacked = _trial(base, targets)
    except UNFIT as error:
        if out_of_memory(error):
            raise ModelError(
                f"model.base {base.name!r}: out of memory on {base.device} in a trial of "
                f"{len(targets)} adapter.targets; choose fewer, or free memory there"
            ) from error
        raise ModelError(
            f"adapter.targets: a trial step on them ends in {type(error).__name__}: {error}; "
            "choose others"
        ) from error
    used = {
        one.name: bool(stacked.factor(stacked.gradients, 0, adapter_names(one)[1]).any())
        for one in targets
    }
    of_experts = {_pattern(name) for name, there in used.items() if there and "expert" in name}
    kept = [one for one in targets if used[one.name] or _pattern(one.name) in of_experts]
    left = sorted({_pattern(one.name) for one in targets} - {_pattern(one.name) for one in kept})
    left += [one.name for one in targets if one not in kept and _pattern(one.name) not in left]
    if not kept:
        raise ModelError(
            f"adapter.targets: none of these layers of {type(base.model).__name__} gets a gradient "
            f"from text: {listed(left)}; choose layers of its language model"
        )
    if left:
        _log.warning(
            "%s: %d of %d adapter.targets get no gradient from text and are left out: %s",
            base.name,
            len(targets) - len(kept),
            len(targets),
            listed(left),
        )
    return kept


def _pattern(name: str) -> str:
    """A layer's path with a star for each number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _trial(base: BaseModel, targets: Sequence[TargetModule]) -> tuple[Tensor, StackedAdapters]:
    """Losses of three rows, and an adapter with its gradient, whichever path the base takes."""
    from fedmira.model.packed.passes import response_losses

    limit = min(base.num_embeddings, len(base.tokenizer))
    draw = torch.Generator().manual_seed(0)
    head, *tails = (
        torch.randint(0, limit, (size,), generator=draw).tolist() for size in (9, 8, 14, 5)
    )
    rows = [_Row(head + tail[:-3], tail[-3:]) for tail in tails]
    stacked = StackedAdapters(targets, [start_adapter(targets, 1, 0)], [1.0], base.device)
    with LoraBranch(base.model, stacked) as branch:
        (losses,) = response_losses(base, branch, [(0, rows)], 10_000)
        total = losses.values.sum()
        if total.requires_grad:  # no layer of these is read where it does not
            total.backward()  # type: ignore[no-untyped-call]
    return torch.cat([losses.values.detach()[losses.rows == i] for i in range(len(rows))]), stacked


def _any_target(base: BaseModel) -> list[TargetModule]:
    """Layers of the decoder, without the head and what stands before it."""
    decoder = base.model.base_model
    linear = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in decoder.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
    )
    usual = [
        name
        for name in ("q_proj", "c_attn", "query_key_value")
        if any(path.endswith(name) for path, _ in base.model.named_modules())
    ]
    return find_targets(base.model, [*usual, *linear][:1])
