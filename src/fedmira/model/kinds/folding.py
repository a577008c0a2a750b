"""An adapter folded into the weights of its base: one model for readers that know no adapters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from fedmira.adapters import Adapter, modules
from fedmira.errors import ModelError, RunError
from fedmira.model.base.files import listed
from fedmira.model.base.loading import read_again
from fedmira.model.base.types import BaseModel, TargetModule
from fedmira.model.generation.generate import end_tokens
from fedmira.model.kinds.lora import LoraKind
from fedmira.model.kinds.proof import plain_peft
from fedmira.model.lora.stack import adapter_names

__all__ = ["FoldProof", "Logits", "adapter_logits", "held_against", "write_folded"]

EXACT = 1e-4
"""Largest difference of logits, as a share of the largest logit, that is rounding in float32."""

_PLACES = 16
"""Most positions of a row whose logits are kept: those of a large vocabulary fill the memory."""

Logits = tuple[Tensor, ...]
"""Of each row, float32 [positions, vocabulary] on the CPU."""


@dataclass(frozen=True, slots=True)
class FoldProof:
    """What was found when two models were held against each other on the same rows.

    Attributes:
        rows: how many rows were read.
        positions: of those rows, at which all logits were compared.
        largest: largest difference of a logit between what was written and base with adapter.
        exact: the same before anything was rounded to the number type that is written.
        logit: the largest logit of base with adapter, in size.
        effect: largest difference of a logit that the adapter makes to its base.
    """

    rows: int
    positions: int
    largest: float
    exact: float
    logit: float
    effect: float


def adapter_logits(
    base: BaseModel, folder: Path, rows: Sequence[Sequence[int]]
) -> tuple[Logits, Logits]:
    """Logits of a base with and without an adapter, in float32, through plain PEFT.

    Args:
        base: the frozen base; a copy of it is read or made, and it stays as it is.
        folder: the adapter, in PEFT's form.
        rows: token ids, none empty.
    """
    with plain_peft(_copy_of(base), folder) as model:
        found = _logits(model, rows)
        with cast(Any, model).disable_adapter():
            bare = _logits(model, rows)
    return found, bare


def held_against(found: Logits, wanted: Logits, bare: Logits, exact: float) -> FoldProof:
    """What two models say to the same rows, held against each other.

    Args:
        found: logits of what was written.
        wanted: those of the base with its adapter.
        bare: those of the base alone.
        exact: largest difference before anything was rounded.

    Raises:
        RunError: a logit is no finite number.
    """
    largest = _difference(found, wanted)
    if not all(bool(one.isfinite().all()) for one in found):
        raise RunError(
            "what was written computes logits that are NaN or infinite, as numbers too large for "
            "its number type become; export with --dtype bfloat16 or float32"
        )
    return FoldProof(
        rows=len(wanted),
        positions=sum(len(one) for one in wanted),
        largest=largest,
        exact=exact,
        logit=max(float(one.abs().max()) for one in wanted),
        effect=_difference(wanted, bare),
    )


def write_folded(
    kind: LoraKind,
    adapter: Adapter,
    *,
    source: Path,
    dtype: torch.dtype,
    rows: Sequence[Sequence[int]],
    folder: Path,
    max_new_tokens: int,
) -> FoldProof:
    """Writes base and adapter as one Hugging Face model, and proves that it says the same.

    W + s B A is computed in float32 and held against plain PEFT there; then it is rounded to
    `dtype`, written, and read back.

    Args:
        kind: the adapters, on their base, which stays as it is.
        adapter: its factors.
        source: the folder of the adapter in PEFT's form.
        dtype: number type of all weights that are written.
        rows: token ids whose logits are compared.
        folder: exists; receives config.json, weights and generation_config.json.
        max_new_tokens: longest answer, for generation_config.json.

    Raises:
        ModelError: the base is quantised, or a layer shares its weight with another one.
        RunError: the logits differ by more than rounding, or a weight is not finite once it is
            rounded.
    """
    base, targets = kind.base, kind.targets
    scale = kind.scale(next(iter(modules(adapter).values()))[0].shape[0])
    if getattr(base.model.config, "quantization_config", None):
        raise ModelError(
            f"model.base {base.name!r} is quantised, and no adapter can be added to such weights "
            "without rounding them again; export the adapter without --merged, or train on the "
            "base as it was before it was quantised"
        )
    wanted, bare = adapter_logits(base, source, rows)
    model = _copy_of(base)
    _refuse_shared(model, targets)
    _fold(model, targets, adapter, scale)
    exact = _difference(_logits(model, rows), wanted)
    largest = max(float(one.abs().max()) for one in wanted)
    if not exact <= EXACT * max(1.0, largest):  # also where it is not a number
        raise RunError(
            f"merged weights and base with adapter differ by {exact:.3g} in a logit, of logits up "
            f"to {largest:.3g}, before anything was rounded; this is no rounding: do not use this "
            "export, and report the base"
        )
    model.to(dtype=dtype)  # type: ignore[call-arg]
    _refuse_infinite(model, dtype)
    _write(base, model, folder, max_new_tokens)
    kept = {target.name: _weight(model, target).detach().cpu() for target in targets}
    device = base.device
    del model
    again = _read(folder, device)
    changed = [
        target.name
        for target in targets
        if not torch.equal(_weight(again, target).cpu(), kept[target.name])
    ]
    if changed:
        raise RunError(f"{folder}: read back, it has other numbers in {listed(changed)}")
    proof = held_against(_logits(again, rows), wanted, bare, exact)
    if dtype == torch.float32 and not proof.largest <= EXACT * max(1.0, proof.logit):
        raise RunError(
            f"{folder}: read back, its logits differ by {proof.largest:.3g} from those of base "
            f"with adapter, of logits up to {proof.logit:.3g}; do not use this export, and report "
            "the base"
        )
    return proof


def _copy_of(base: BaseModel) -> PreTrainedModel:
    """The base once more in float32: from its files, or of the one in memory."""
    if base.reloadable:
        return read_again(base, torch.float32)
    copied = copy.deepcopy(base.model)
    copied.to(dtype=torch.float32)  # type: ignore[call-arg]
    return copied


def _fold(
    model: PreTrainedModel, targets: Sequence[TargetModule], adapter: Adapter, scale: float
) -> None:
    with torch.no_grad():
        for target in targets:
            down, up = (adapter[name] for name in adapter_names(target))
            weight = _weight(model, target)
            product = scale * (up.to(weight.device).float() @ down.to(weight.device).float())
            weight += product.T if target.stored_transposed else product


def _weight(model: nn.Module, target: TargetModule) -> Tensor:
    weight = model.get_submodule(target.name).weight
    assert isinstance(weight, Tensor)
    return weight


def _refuse_shared(model: PreTrainedModel, targets: Sequence[TargetModule]) -> None:
    """Refuses layers whose weight is that of another module too, which would change with it."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(weight := getattr(module, "weight", None), Tensor):
            owners.setdefault(weight.data_ptr(), []).append(name)
    shared = [
        f"{target.name} with {listed([name for name in users if name != target.name])}"
        for target in targets
        if len(users := owners[_weight(model, target).data_ptr()]) > 1
    ]
    if shared:
        raise ModelError(
            f"--merged: layers share their weights ({listed(shared)}), so an adapter on one cannot "
            "be added to it alone; export the adapter without --merged"
        )


def _refuse_infinite(model: PreTrainedModel, dtype: torch.dtype) -> None:
    bad = [
        name
        for name, tensor in model.named_parameters()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if bad:
        raise RunError(
            f"--dtype {str(dtype).removeprefix('torch.')}: weights are too large for it in "
            f"{listed(bad)}; export with --dtype bfloat16 or float32"
        )


def _write(base: BaseModel, model: PreTrainedModel, folder: Path, max_new_tokens: int) -> None:
    model.config._name_or_path = ""  # it is another model than the base
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_tokens(base),
        pad_token_id=base.tokenizer.pad_token_id,
        bos_token_id=base.tokenizer.bos_token_id,
    )
    model.save_pretrained(folder)


def _read(folder: Path, device: torch.device) -> PreTrainedModel:
    """As a user of transformers reads it, in the number type in which it is stored."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return cast(PreTrainedModel, loaded.to(device).eval())


def _logits(model: nn.Module, rows: Sequence[Sequence[int]]) -> Logits:
    """At most `_PLACES` positions of each row, spread evenly, the last among them."""
    device = next(model.parameters()).device
    found = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([list(row)], device=device)
            step = max(1, -(-len(row) // _PLACES))
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            # Virtual tokens of prompt encoders stand in front of the row's own.
            found.append(logits[0, -len(row) :].flip(0)[::step].float().cpu())
    return tuple(found)


def _difference(one: Logits, other: Logits) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
