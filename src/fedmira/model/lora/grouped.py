"""One product for the branches of all clients of a pass, where the device has grouped products.

A loop over clients starts some fifteen kernels a client and layer, so a step of a large cohort
waits for the program that starts them. A grouped product multiplies each client's stretch of the
flat row with that client's matrix, and its launches do not grow with the clients.

In bfloat16 the gradient that one pass adds is rounded once before it is summed in float32; the loop
over clients, which a CPU takes, sums unrounded products.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedmira.model.base.transfer import on_device
from fedmira.model.lora.stack import GROUP_MULTIPLE, StackedAdapters, adapter_names

__all__ = ["GroupedFactors", "add_grouped", "products_grouped"]

_log = logging.getLogger("fedmira")
_product: Callable[..., Tensor] | None = getattr(
    torch.nn.functional, "grouped_mm", getattr(torch, "_grouped_mm", None)
)
"""Public in torch 2.11 and later; earlier releases have it by its second name, if at all."""


@lru_cache(maxsize=16)
def products_grouped(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether branches on this device are made by grouped products.

    On CUDA small products of every kind are tried once a process and compared with plain ones. The
    meta device has all that CUDA has. A CPU has fast enough loops.

    Args:
        device: of the stacked adapters.
        dtype: that the base computes in.
    """
    if _product is None or device.type not in ("cuda", "meta") or dtype != torch.bfloat16:
        return False
    if device.type == "meta":
        return True
    try:
        agree = _trial(device, dtype)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        _log.info(
            "grouped products are not used on %s: %s: %s",
            device,
            type(error).__name__,
            str(error).splitlines()[0] if str(error) else "no reason given",
        )
        return False
    if not agree:
        _log.warning("grouped products on %s differ from plain ones and are not used", device)
    return agree


def _trial(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the three shapes of product that are used give what plain products give.

    Raises:
        RuntimeError: there is no such product, or it waits for the device to read where the groups
            end, as the stand-in for devices without the kernel does; a loop is faster then.
    """
    assert _product is not None
    draw = torch.Generator().manual_seed(0)
    sizes = [5, 24, 3]
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32).to(device)
    tokens, grads, factors = (
        torch.randn(*shape, generator=draw).to(device, dtype)
        for shape in ((sum(sizes), 64), (sum(sizes), 16), (3, 16, 64))
    )
    pairs = [
        (tokens, factors.transpose(1, 2)),
        (grads, factors),
        (grads.T, tokens),
    ]
    near = []
    for left, right in pairs:
        _product(left, right, offs=ends)  # loads kernels
        with _no_waiting(device):
            found = _product(left, right, offs=ends)
        split = torch.split(left, sizes, dim=1 if right.ndim == 2 else 0)
        parts = torch.split(right, sizes) if right.ndim == 2 else right.unbind()
        plain = [one.float() @ other.float() for one, other in zip(split, parts, strict=True)]
        wanted = torch.stack(plain) if right.ndim == 2 else torch.cat(plain)
        near.append((found.float() - wanted).norm() <= 0.01 * wanted.norm())
    return bool(torch.stack(near).all())


@contextmanager
def _no_waiting(device: torch.device) -> Iterator[None]:
    """Within the block, what would wait for a CUDA device raises a RuntimeError."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass
class GroupedFactors:
    """The factors of a cohort in the number type of its base, kept while they do not change.

    Attributes:
        adapters: the cohort, its ranks padded to `GROUP_MULTIPLE`.
    """

    adapters: StackedAdapters
    _fitting: dict[tuple[str, str], bool] = field(default_factory=dict)
    _halves: Tensor | None = None
    _made_of: tuple[int, torch.dtype] | None = None
    _groups: dict[tuple[tuple[int, int], ...], _Groups] = field(default_factory=dict)

    def fits(self, name_a: str, name_b: str) -> bool:
        """Whether a layer's factors have rows that the kernels can read.

        Args:
            name_a, name_b: of the layer's factors, as `adapter_names` gives them.
        """
        if (name_a, name_b) not in self._fitting:
            sizes = [
                size for name in (name_a, name_b) for size in self.adapters.stacked(name).shape[1:]
            ]
            self._fitting[name_a, name_b] = not any(size % GROUP_MULTIPLE for size in sizes)
        return self._fitting[name_a, name_b]

    def groups(self, owners: Sequence[tuple[int, slice]]) -> _Groups:
        """Whose tokens end where, on the device; made once for the layers of a pass."""
        key = tuple((client, part.stop) for client, part in owners if part.stop > part.start)
        if key not in self._groups:
            if len(self._groups) > 8:  # of earlier passes
                self._groups.clear()
            self._groups[key] = _Groups.of(key, self.adapters)
        return self._groups[key]

    def matrix(self, name: str, dtype: torch.dtype) -> Tensor:
        """A factor of all clients, [K, rank, inputs] times each one's scale, or [K, outputs, rank].

        Args:
            name: of the factor.
            dtype: that the base computes in.
        """
        made_of = self.adapters.values._version, dtype
        if self._halves is None or self._made_of != made_of:
            self._halves, self._made_of = self._made(dtype), made_of
        return self.adapters.part(self._halves, name)

    def _made(self, dtype: torch.dtype) -> Tensor:
        values = self.adapters.values.detach()
        halves = values.to(dtype, copy=True)
        scales = on_device(list(self.adapters.scales), values.device, values.dtype)[:, None, None]
        for target in self.adapters.targets:
            name, _ = adapter_names(target)
            torch.mul(
                self.adapters.part(values, name), scales, out=self.adapters.part(halves, name)
            )
        return halves


@dataclass(frozen=True, slots=True)
class _Groups:
    """The clients of a pass, each with some tokens.

    Attributes:
        ends: int32 [n], where the tokens of each end in the flat row; none is empty.
        clients: rows of the stack: a slice, or int64 [n] where they do not follow each other.
        scale: that of all of them, or float32 [n, 1, 1] where they differ.
    """

    ends: Tensor
    clients: slice | Tensor
    scale: float | Tensor

    @classmethod
    def of(cls, key: Sequence[tuple[int, int]], adapters: StackedAdapters) -> _Groups:
        clients = [client for client, _ in key]
        device = adapters.values.device
        in_order = clients == list(range(clients[0], clients[0] + len(clients)))
        scales = [adapters.scales[client] for client in clients]
        return cls(
            on_device([stop for _, stop in key], device, torch.int32),
            slice(clients[0], clients[-1] + 1) if in_order else on_device(clients, device),
            scales[0]
            if len(set(scales)) == 1
            else on_device(scales, device, torch.float32)[:, None, None],
        )

    def add(self, totals: Tensor, gradients: Tensor, scaled: bool = False) -> None:
        """Add gradients [n, ...] to the rows of these clients in `totals` [K, ...].

        Args:
            scaled: whether each is to be multiplied by its client's scale.
        """
        factor = 1.0
        if scaled and isinstance(self.scale, Tensor):
            gradients = gradients * self.scale
        elif scaled:
            factor = float(self.scale)
        if isinstance(self.clients, slice):
            totals[self.clients].add_(gradients, alpha=factor)
        else:
            totals.index_add_(0, self.clients, gradients.to(totals.dtype), alpha=factor)


def add_grouped(
    factors: GroupedFactors,
    names: tuple[str, str],
    owners: Sequence[tuple[int, slice]],
    inputs: Tensor,
    output: Tensor,
) -> Tensor:
    """Add every client's s B A x to the layer's output in place.

    The backward pass adds the factors' gradients to the stack's matrix.

    Args:
        factors: of the cohort.
        names: of the layer's A and B.
        owners: which of the N tokens belong to whom.
        inputs: [1, N, inputs].
        output: [1, N, outputs]; changed in place.
    """
    result: Tensor = _AddGrouped.apply(  # type: ignore[no-untyped-call]
        factors.adapters.anchor, inputs, output, factors, names, factors.groups(owners)
    )
    return result


class _AddGrouped(torch.autograd.Function):
    """A is kept times s, so s stands in the down product and in what goes back to the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        inputs: Tensor,
        output: Tensor,
        factors: GroupedFactors,
        names: tuple[str, str],
        groups: _Groups,
    ) -> Tensor:
        assert _product is not None
        scaled_a, factor_b = (factors.matrix(name, inputs.dtype)[groups.clients] for name in names)
        tokens, result = inputs.flatten(0, -2), output.flatten(0, -2)
        down = _product(tokens, scaled_a.transpose(1, 2), offs=groups.ends)
        result.add_(_product(down, factor_b.transpose(1, 2), offs=groups.ends))
        ctx.mark_dirty(output)
        ctx.save_for_backward(inputs, down)
        ctx.factors, ctx.names, ctx.groups = factors, names, groups
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        assert _product is not None
        inputs, down = ctx.saved_tensors
        groups: _Groups = ctx.groups
        stack: StackedAdapters = ctx.factors.adapters
        scaled_a, factor_b = (
            ctx.factors.matrix(name, inputs.dtype)[groups.clients] for name in ctx.names
        )
        tokens, of_output = inputs.flatten(0, -2), grad.flatten(0, -2)
        to_down = _product(of_output, factor_b, offs=groups.ends)
        of_a, of_b = (stack.part(stack.gradients, name) for name in ctx.names)
        groups.add(of_a, _product(to_down.T, tokens, offs=groups.ends), scaled=True)
        groups.add(of_b, _product(of_output.T, down, offs=groups.ends))
        to_inputs = (
            _product(to_down, scaled_a, offs=groups.ends).view(inputs.shape)
            if ctx.needs_input_grad[1]
            else None
        )
        return None, to_inputs, grad, None, None, None
