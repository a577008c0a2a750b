"""The decoder's layers: where they are, and what torch.compile may fuse of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

__all__ = ["LastLayer", "compile_free_parts", "decoder_layers", "find_last_layer", "uncompile"]


@dataclass(frozen=True, slots=True)
class LastLayer:
    """The decoder's last layer: its index as its attention knows it, and its feed-forward block.

    Attributes:
        index: as its attention knows it.
        feed_forward: its feed-forward block.
    """

    index: int
    feed_forward: nn.Module


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers in order.

    Empty where they cannot be told apart from other lists of as many modules.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return list(stacks[0]) if len(stacks) == 1 and count else []


def find_last_layer(model: PreTrainedModel) -> LastLayer | None:
    """The last layer where it has the usual shape, or None.

    The probe shows whether leaving places out changes nothing.
    """
    layers = decoder_layers(model)
    feed_forward = getattr(layers[-1], "mlp", None) if layers else None
    return LastLayer(len(layers) - 1, feed_forward) if isinstance(feed_forward, nn.Module) else None


def compile_free_parts(layers: Sequence[nn.Module], carriers: Sequence[nn.Module]) -> int:
    """Let torch.compile fuse the parts of the layers that carry no adapter; how many there are.

    Those are norms and feed-forward blocks.

    Args:
        layers: with no part compiled, see `uncompile`.
        carriers: modules that carry an adapter, whose hooks must go on running as they are.
    """
    carrying = {id(module) for module in carriers}
    parts = [
        part
        for layer in layers
        for part in layer.children()
        # Attention is another function in each pass: ours, with the pass's layout.
        if not hasattr(part, "layer_idx")
        and not any(id(module) in carrying for module in part.modules())
    ]
    for part in parts:
        if "forward" not in vars(part):
            part.forward = torch.compile(part.forward, dynamic=True)
    return len(parts)


def uncompile(layers: Sequence[nn.Module]) -> None:
    """Undo what `compile_free_parts` did.

    A base may serve several runs, with other adapters on it and other options.
    """
    for part in (part for layer in layers for part in layer.children()):
        if hasattr(vars(part).get("forward"), "_torchdynamo_orig_callable"):
            del part.forward
