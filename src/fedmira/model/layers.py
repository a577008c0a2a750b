"""The decoder's layers: the last one runs only where it is read, and all of them can be recomputed instead of remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from fedmira.model.lora import LoraBranch

__all__ = ["LastLayer", "compile_free_parts", "decoder_layers", "find_last_layer", "read_only_at", "recomputed", "uncompile"]


@dataclass(frozen=True, slots=True)
class LastLayer:
    """The decoder's last layer: its index, as its attention knows it, and its feed-forward block."""

    index: int
    feed_forward: nn.Module


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers in order; empty where they cannot be told apart from other lists of as many modules."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return list(stacks[0]) if len(stacks) == 1 and count else []


def find_last_layer(model: PreTrainedModel) -> LastLayer | None:
    """The last layer where it has the usual shape, or None; the probe shows whether leaving places out changes nothing."""
    layers = decoder_layers(model)
    feed_forward = getattr(layers[-1], "mlp", None) if layers else None
    return LastLayer(len(layers) - 1, feed_forward) if isinstance(feed_forward, nn.Module) else None


def compile_free_parts(layers: Sequence[nn.Module], carriers: Sequence[nn.Module]) -> int:
    """Let torch.compile fuse those parts of the layers (norms, feed-forward blocks) that carry no adapter; how many there are.

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
        if not hasattr(part, "layer_idx") and not any(id(module) in carrying for module in part.modules())
    ]
    for part in parts:
        if "forward" not in vars(part):
            part.forward = torch.compile(part.forward, dynamic=True)
    return len(parts)


def uncompile(layers: Sequence[nn.Module]) -> None:
    """Undo what `compile_free_parts` did: a base may serve several runs, with other adapters on it and other options."""
    for part in (part for layer in layers for part in layer.children()):
        if hasattr(vars(part).get("forward"), "_torchdynamo_orig_callable"):
            del part.forward


@contextmanager
def read_only_at(layer: LastLayer, places: Tensor, branch: LoraBranch, owners: Sequence[tuple[int, slice]]) -> Iterator[None]:
    """Within the block the last feed-forward block sees a flat row [1, N, hidden] at `places` only and gives zero elsewhere.

    Behind the last attention only the places that predict a response token are read.

    Args:
        places: int64 [M].
        owners: which of the M places belong to whom, for branches on layers inside the block.
    """
    outside = branch.owners
    num_places = max(part.stop for _, part in outside)

    def take(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        branch.owners = owners
        return (arguments[0][:, places], *arguments[1:])

    def put(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        branch.owners = outside
        return output.new_zeros(1, num_places, output.shape[-1]).index_copy(1, places, output)

    handles = [layer.feed_forward.register_forward_pre_hook(take), layer.feed_forward.register_forward_hook(put)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recomputed(layers: Sequence[nn.Module], branch: LoraBranch, surroundings: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Within the block each layer keeps only its input and computes the rest again in the backward pass (Chen et al. 2016).

    Args:
        surroundings: what must be in force while a layer runs; the backward pass comes after it has ended.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        states = [generator.get_state() for generator in branch.generators]
        return nullcontext(), again([state.clone() for state in states])

    @contextmanager
    def again(states: Sequence[Tensor]) -> Iterator[None]:
        present = [generator.get_state() for generator in branch.generators]
        for generator, state in zip(branch.generators, states, strict=True):
            generator.set_state(state)  # dropout drops the same inputs again
        try:
            with surroundings():
                yield
        finally:
            for generator, state in zip(branch.generators, present, strict=True):
                generator.set_state(state)

    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:  # somebody else had wrapped it
                layer.forward = forward
