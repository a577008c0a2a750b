"""Which linear layers of a base carry a LoRA branch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedmira.errors import ModelError
from fedmira.model.base.types import TargetModule

__all__ = ["find_targets", "usual_names"]

ALL_LINEAR = "all-linear"
"""In place of names: every linear layer of the language model but the head, as in PEFT."""
_USUAL_TARGETS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "v_proj"),
    ("c_attn",),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("query", "value"),
)


def find_targets(model: nn.Module, wanted: Sequence[str]) -> list[TargetModule]:
    """The linear layers whose name ends in one of `wanted`, in the model's order.

    Empty `wanted` takes the usual ones.

    Args:
        model: the frozen model.
        wanted: endings of module names, as in `adapter.targets`, or "all-linear" alone.

    Raises:
        ModelError: a wanted name matches nothing, or matches something that is not linear; lists
            what exists.
    """
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not _is_head(model, module)
    }
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if not wanted or list(wanted) == [ALL_LINEAR]:
        # A base that also reads pictures has layers of the same names outside its language model.
        inside = _decoder_parts(model)
        linear = {name: module for name, module in linear.items() if id(module) in inside}
        suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear})
        if wanted and linear:
            return [_describe(path, module) for path, module in linear.items()]
        wanted = next((usual for usual in _USUAL_TARGETS if set(usual) <= set(suffixes)), ())
        if not wanted:
            raise ModelError(
                f"adapter.targets: no usual layer was found in {type(model).__name__}; "
                f"choose from {', '.join(suffixes)}"
            )
    unknown = [name for name in wanted if not any(_matches(path, name) for path in linear)]
    if unknown:
        raise ModelError(
            [
                f"adapter.targets: {name!r} is no linear layer of {type(model).__name__}; "
                f"choose from {', '.join(suffixes)}"
                for name in unknown
            ]
        )
    return [
        _describe(path, module)
        for path, module in linear.items()
        if any(_matches(path, name) for name in wanted)
    ]


def usual_names(model: nn.Module) -> list[tuple[str, ...]]:
    """The usual names of which the model has all, in the order in which they are tried.

    Args:
        model: the frozen model.
    """
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not _is_head(model, module)
    }
    return [usual for usual in _USUAL_TARGETS if set(usual) <= linear]


def _matches(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _describe(path: str, module: nn.Module) -> TargetModule:
    if isinstance(module, nn.Linear):  # a quantised weight has another shape than the layer
        return TargetModule(path, module.in_features, module.out_features, False)
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return TargetModule(path, rows, columns, True)


def _decoder_parts(model: nn.Module) -> set[int]:
    """The identities of the language model's modules.

    Of all modules where it cannot be told apart.
    """
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model  # type: ignore[no-untyped-call]
    return {id(module) for module in (decoder or model).modules()}


def _is_head(model: nn.Module, module: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) and module is model.get_output_embeddings()  # type: ignore[no-untyped-call]
