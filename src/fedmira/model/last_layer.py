"""Behind the last attention only the places that predict a response token are read, so the last feed-forward block runs there alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from fedmira.model.lora import LoraBranch

__all__ = ["LastLayer", "find_last_layer", "read_only_at"]


@dataclass(frozen=True, slots=True)
class LastLayer:
    """The decoder's last layer: its index, as its attention knows it, and its feed-forward block."""

    index: int
    feed_forward: nn.Module


def find_last_layer(model: PreTrainedModel) -> LastLayer | None:
    """The last layer where it has the usual shape, or None; the probe shows whether leaving places out changes nothing."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    feed_forward = getattr(stacks[0][-1], "mlp", None) if len(stacks) == 1 and count else None
    return LastLayer(count - 1, feed_forward) if isinstance(feed_forward, nn.Module) else None


@contextmanager
def read_only_at(layer: LastLayer, places: Tensor, branch: LoraBranch, owners: Sequence[tuple[int, slice]]) -> Iterator[None]:
    """Within the block the last feed-forward block sees a flat row [1, N, hidden] at `places` only and gives zero elsewhere.

    Args:
        places: int64 [M].
        owners: which of the M places belong to whom, for branches on layers inside the block.
    """
    outside = branch.owners

    def take(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        branch.owners = owners
        return (arguments[0][:, places], *arguments[1:])

    def put(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        branch.owners = outside
        return output.new_zeros(1, num_places, output.shape[-1]).index_copy(1, places, output)

    num_places = max(part.stop for _, part in outside)
    handles = [layer.feed_forward.register_forward_pre_hook(take), layer.feed_forward.register_forward_hook(put)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
