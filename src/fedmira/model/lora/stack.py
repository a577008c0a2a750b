"""LoRA for a whole cohort on one frozen base (Hu et al. 2021).

Every client's factors in one matrix.

    h = W0 x + s_k B_k A_k x        s_k = alpha / r_k

Row k of `values` [K, P] holds all factors of client k, padded with zeros to the cohort's largest
rank. Zero factors have zero gradients, so the padding changes nothing, and one optimizer step moves
all clients at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmira.adapters import Adapter
from fedmira.errors import ModelError
from fedmira.model.base.types import TargetModule

__all__ = ["GROUP_MULTIPLE", "StackedAdapters", "adapter_names", "start_adapter"]

GROUP_MULTIPLE = 8
"""What kernels of grouped products want ranks and sizes of layers to be multiples of.

They read rows of 16 bytes, which are eight numbers in bfloat16.
"""

_PREFIX = "base_model.model."


def adapter_names(target: TargetModule) -> tuple[str, str]:
    """PEFT's names of a layer's A [r, inputs] and B [outputs, r]."""
    return f"{_PREFIX}{target.name}.lora_A.weight", f"{_PREFIX}{target.name}.lora_B.weight"


def start_adapter(targets: Sequence[TargetModule], rank: int, seed: int) -> Adapter:
    """The common start: A uniform in +-1/sqrt(inputs), B zero.

    This is Kaiming with a = sqrt(5), as PEFT draws it.

    Args:
        targets: the linear layers that carry adapters, in the model's order.
        rank: r of the adapter.
        seed: of the run.
    """
    generator = torch.Generator().manual_seed(seed)
    adapter: dict[str, Tensor] = {}
    for target in targets:
        name_a, name_b = adapter_names(target)
        bound = 1 / math.sqrt(target.inputs)
        adapter[name_a] = (torch.rand(rank, target.inputs, generator=generator) * 2 - 1) * bound
        adapter[name_b] = torch.zeros(target.outputs, rank)
    return adapter


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a factor lies in a client's row; `rank_axis` is 0 for A and 1 for B."""

    offset: int
    shape: tuple[int, int]
    rank_axis: int


class StackedAdapters:
    """The adapters of a cohort of K clients as one float32 matrix [K, P].

    Gradients have the same shape.

    Args:
        adapters: one per client; names and layer sizes agree, ranks may differ.
        scales: alpha / rank of each client.
        device: where the matrix lives.
        trainable: whether there are gradients; without them nothing is allocated for training.
        multiple: ranks are padded to a multiple of it; None pads to `GROUP_MULTIPLE` where
            products may be grouped, which is not on a CPU.

    Attributes:
        targets: the linear layers that carry adapters, in the model's order.

    Raises:
        ModelError: an adapter does not fit `targets`.
    """

    def __init__(
        self,
        targets: Sequence[TargetModule],
        adapters: Sequence[Adapter],
        scales: Sequence[float],
        device: torch.device,
        trainable: bool = True,
        multiple: int | None = None,
    ) -> None:
        self.targets = tuple(targets)
        self.scales = tuple(scales)
        first_a = adapter_names(self.targets[0])[0]
        self.ranks = tuple(adapter[first_a].shape[0] for adapter in adapters)
        multiple = multiple or (1 if device.type == "cpu" else GROUP_MULTIPLE)
        self._slots = _slots(self.targets, -(-max(self.ranks) // multiple) * multiple)
        width = sum(math.prod(slot.shape) for slot in self._slots.values())
        values = torch.zeros(len(adapters), width)
        for client, adapter in enumerate(adapters):
            self._fill(values, client, adapter)
        self.values = values.to(device)
        self.gradients = torch.zeros_like(self.values) if trainable else self.values.new_empty(0)
        # Branches write their gradients into `gradients` themselves; this stands for them in the
        # autograd graph.
        self.anchor = torch.zeros(0, device=device, requires_grad=trainable)

    def __len__(self) -> int:
        return len(self.ranks)

    def ratios(self, ratio: float) -> Tensor:
        """Learning rates in times that of A: 1 for its entries and `ratio` for those of B, [P].

        Args:
            ratio: of LoRA+ (Hayou et al. 2024, arXiv 2402.12354).
        """
        shares = torch.ones(self.values.shape[1])
        for slot in self._slots.values():
            if slot.rank_axis == 1:
                shares[slot.offset : slot.offset + math.prod(slot.shape)] = ratio
        return shares.to(self.values.device)

    def stacked(self, name: str) -> Tensor:
        """A factor of all clients, padded: [K, rank, inputs] or [K, outputs, rank].

        Shares memory.
        """
        return self.part(self.values, name)

    def part(self, matrix: Tensor, name: str) -> Tensor:
        """A factor of all clients in a [K, P] matrix: [K, rank, inputs] or [K, outputs, rank].

        Shares memory. The matrix may hold values, gradients or moments.

        Args:
            matrix: one row of parameters a client, [K, P].
            name: of the factor, as `adapter_names` gives it.
        """
        slot = self._slots[name]
        return matrix[:, slot.offset : slot.offset + math.prod(slot.shape)].view(
            len(matrix), *slot.shape
        )

    def factor(self, matrix: Tensor, client: int, name: str) -> Tensor:
        """A client's factor in a [K, P] matrix, as a view at its own rank.

        The matrix may hold values, gradients or moments.

        Args:
            matrix: one row of parameters a client, [K, P].
            client: index of the client in the cohort.
            name: of the factor, as `adapter_names` gives it.
        """
        return self._cut(matrix[client], self.ranks[client], name)

    def adapter(self, client: int) -> Adapter:
        """A copy of a client's adapter at its own rank, on the CPU."""
        return self.copied(self.values, client)

    def copied(self, matrix: Tensor, client: int) -> Adapter:
        """A copy of a client's row of a [K, P] matrix at its own rank, on the CPU.

        Args:
            matrix: values, gradients or moments.
            client: index of the client in the cohort.
        """
        row = matrix[client].detach().cpu()  # in one piece: each copy from a device is waited for
        return {
            name: self._cut(row, self.ranks[client], name).clone(
                memory_format=torch.contiguous_format
            )
            for name in self._slots
        }

    def views(self, matrix: Tensor, client: int) -> Adapter:
        """A client's row of a [K, P] matrix, as named views at its own rank.

        The matrix may hold values, gradients or moments.
        """
        return {name: self.factor(matrix, client, name) for name in self._slots}

    def _cut(self, row: Tensor, rank: int, name: str) -> Tensor:
        """A factor at that rank as a view of a row [P]."""
        slot = self._slots[name]
        return (
            row[slot.offset : slot.offset + math.prod(slot.shape)]
            .view(slot.shape)
            .narrow(slot.rank_axis, 0, rank)
        )

    def _fill(self, values: Tensor, client: int, adapter: Adapter) -> None:
        for name, view in self.views(values, client).items():
            if name not in adapter or adapter[name].shape != view.shape:
                found = tuple(adapter[name].shape) if name in adapter else "nothing"
                raise ModelError(
                    f"adapter of client number {client}: {name} must have shape "
                    f"{tuple(view.shape)}; found {found}. It was made "
                    "for other targets or another base"
                )
            view.copy_(adapter[name])


def _slots(targets: Sequence[TargetModule], rank: int) -> dict[str, _Slot]:
    slots: dict[str, _Slot] = {}
    offset = 0
    for target in targets:
        for name, shape, axis in zip(
            adapter_names(target),
            ((rank, target.inputs), (target.outputs, rank)),
            (0, 1),
            strict=True,
        ):
            slots[name] = _Slot(offset, shape, axis)
            offset += math.prod(shape)
    return slots
