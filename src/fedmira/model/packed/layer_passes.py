"""How a decoder's layers run within a pass.

The last one only where it is read, and all of them recomputed, not remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedmira.model.base.layers import LastLayer
from fedmira.model.lora.branch import LoraBranch

__all__ = ["read_only_at", "recomputed"]


@contextmanager
def read_only_at(
    layer: LastLayer, places: Tensor, branch: LoraBranch, owners: Sequence[tuple[int, slice]]
) -> Iterator[None]:
    """Let the last feed-forward block see only `places` of a flat row [1, N, hidden].

    Elsewhere it gives zero. This holds within the block of the with statement.

    Behind the last attention only the places that predict a response token are read.

    Args:
        places: int64 [M].
        owners: which of the M places belong to whom, for branches on layers inside the block.
        layer: the last layer.
        branch: the adapters of the clients, as they are hooked into the layers.
    """
    outside = branch.owners
    num_places = max(part.stop for _, part in outside)

    def take(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        branch.owners = owners
        return (arguments[0][:, places], *arguments[1:])

    def put(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        branch.owners = outside
        return output.new_zeros(1, num_places, output.shape[-1]).index_copy(1, places, output)

    handles = [
        layer.feed_forward.register_forward_pre_hook(take),
        layer.feed_forward.register_forward_hook(put),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recomputed(
    layers: Sequence[nn.Module],
    branch: LoraBranch,
    surroundings: Callable[[], AbstractContextManager[Any]],
) -> Iterator[None]:
    """Let each layer keep only its input and compute the rest again in the backward pass.

    This is recomputation by Chen et al. (2016), within the block of the with statement.

    Args:
        surroundings: what must be in force while a layer runs; the backward pass comes after it has
            ended.
        layers: the decoder's layers.
        branch: the adapters of the clients, as they are hooked into the layers.
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
        layer.forward = partial(
            checkpoint,
            layer.forward,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=contexts,
        )
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:  # somebody else had wrapped it
                layer.forward = forward
