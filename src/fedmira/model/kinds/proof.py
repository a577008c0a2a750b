"""What plain PEFT makes of saved adapters: the same layers, the same numbers, the same losses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as functional
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from fedmira.adapters import Adapter
from fedmira.errors import ModelError, RunError
from fedmira.model.base.files import listed
from fedmira.model.base.loading import read_again
from fedmira.model.base.memory import free_bytes
from fedmira.model.base.rows import Row
from fedmira.model.base.types import BaseModel, TargetModule
from fedmira.model.kinds.peft_files import lora_config
from fedmira.model.lora.stack import adapter_names
from fedmira.model.packed.probe import losses_agree

__all__ = ["check_wrapped", "plain_peft", "prove_export"]

_PREFIX = "base_model.model."


def check_wrapped(base: BaseModel, targets: Sequence[TargetModule], alpha: float) -> None:
    """Refuses targets that PEFT takes for other layers, as where it rewrites those of experts.

    PEFT gets our settings for a copy of the model without numbers.

    Args:
        base: the frozen base.
        targets: the linear layers that carry adapters, in the model's order.
        alpha: scale of LoRA; the branch is alpha / r times B A.

    Raises:
        ModelError: names the layers.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about transformers, and about names we give it
        try:
            wrapped = peft.get_peft_model(
                _without_numbers(base.model), lora_config(base, targets, 1, alpha, 0.0)
            )
        except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
            raise ModelError(
                f"adapter.targets: plain PEFT refuses {_ends(targets)} of "
                f"{type(base.model).__name__} ({str(error).splitlines()[0]}), so saved adapters "
                "could not be loaded; choose other adapter.targets"
            ) from error
    if difference := _other_layers(wrapped, targets):
        raise ModelError(
            f"adapter.targets: with {_ends(targets)} of {type(base.model).__name__}, plain PEFT "
            f"{difference}, so saved adapters would act otherwise than trained; choose other "
            "adapter.targets"
        )


def _without_numbers(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model's modules whose parameters and buffers have shapes alone."""
    shapes: dict[int, Any] = {
        id(part): nn.Parameter(part.to("meta"), requires_grad=False) for part in model.parameters()
    }
    shapes |= {id(part): part.to("meta") for part in model.buffers()}
    for module in model.modules():  # such as the state that recurrent layers keep of their last row
        shapes |= {
            id(part): part.detach().to("meta")
            for part in vars(module).values()
            if isinstance(part, torch.Tensor)
        }
    return copy.deepcopy(model, shapes)


def prove_export(
    base: BaseModel,
    targets: Sequence[TargetModule],
    folder: Path,
    adapter: Adapter,
    rows: Sequence[Row],
    reported: float,
) -> float:
    """Load a saved adapter as a user of plain PEFT does, and hold it against what was trained.

    Args:
        targets: the layers that carry it; none for other kinds than LoRA.
        folder: of the adapter.
        adapter: as it was trained.
        rows: whose response loss is compared.
        reported: that loss, in nats a response token.
        base: the frozen base.

    Returns:
        PEFT's loss.

    Raises:
        RunError: a layer or the loss differs; names it.
    """
    with _loaded(base, folder) as model:
        for problem in (_other_layers(model, targets), _other_numbers(model, targets, adapter)):
            if problem:
                raise RunError(f"{folder}: loaded with plain PEFT, it {problem}")
        found = _loss(model, base, rows)
    if not losses_agree(torch.tensor(found), torch.tensor(reported), base.dtype):
        raise RunError(
            f"{folder}: loaded with plain PEFT, its loss on {len(rows)} rows is {found:.6f}, and "
            f"{reported:.6f} was reported; do not pass the adapters on, and report this base"
        )
    return found


@contextmanager
def _loaded(base: BaseModel, folder: Path) -> Iterator[nn.Module]:
    """The adapter on a base that is loaded anew, or on the one at hand where memory is short."""
    model = base.model
    needed = sum(part.numel() * part.element_size() for part in model.parameters())
    fresh = base.reloadable and needed < free_bytes(base.device) / 2
    with plain_peft(read_again(base) if fresh else model, folder) as loaded:
        yield loaded


@contextmanager
def plain_peft(model: PreTrainedModel, folder: Path) -> Iterator[nn.Module]:
    """A model with an adapter as plain PEFT loads it; afterwards the model is as it was.

    Args:
        model: of transformers.
        folder: of the adapter.
    """
    # PEFT draws factors before it reads them.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about transformers, and about names we give it
        loaded: Any = peft.PeftModel.from_pretrained(model, str(folder))
    try:
        yield loaded.eval()
    finally:
        if any(isinstance(part, LoraLayer) for part in loaded.modules()):
            loaded.unload()


def _other_layers(wrapped: nn.Module, targets: Sequence[TargetModule]) -> str:
    """How PEFT's layers differ from ours, "" where they do not or there are none."""
    found = {
        name.removeprefix(_PREFIX)
        for name, part in wrapped.named_modules()
        if isinstance(part, LoraLayer)
    }
    wanted = {target.name for target in targets}
    if left := sorted(wanted - found):
        return f"leaves {listed(left)} without an adapter"
    if added := sorted(found - wanted):
        return f"puts an adapter on {listed(added)} too"
    return ""


def _other_numbers(model: nn.Module, targets: Sequence[TargetModule], adapter: Adapter) -> str:
    """Which layer has other factors than were trained, "" where none has."""
    there = dict(model.named_parameters())
    for target in targets:
        for name in adapter_names(target):
            own = there.get(name.replace(".weight", ".default.weight"))
            if own is None or not torch.equal(own.detach().float().cpu(), adapter[name]):
                return f"has other numbers in {name}"
    return ""


def _loss(model: nn.Module, base: BaseModel, rows: Sequence[Row]) -> float:
    """Nats a response token, one row after another, by the model's own forward pass."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([*row.prompt, *row.response], device=base.device)
            size = len(row.response)
            logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits
            total += float(
                functional.cross_entropy(
                    logits[0, -size - 1 : -1].float(), ids[-size:], reduction="sum"
                )
            )
            tokens += size
    return total / tokens


def _ends(targets: Sequence[TargetModule]) -> str:
    return listed(sorted({target.name.rsplit(".", 1)[-1] for target in targets}))
