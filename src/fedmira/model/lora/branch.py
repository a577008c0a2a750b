"""The hooks by which a cohort's LoRA branches act within the passes of one frozen base.

A layer gives W0 x + s_k B_k A_k x for the tokens of client k: the branch is added to the layer's
output in place, and the backward pass, written by hand, adds the factors' gradients to the stack's
matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedmira.model.base.transfer import sent
from fedmira.model.lora.grouped import GroupedFactors, add_grouped, products_grouped
from fedmira.model.lora.stack import StackedAdapters, adapter_names

__all__ = ["LoraBranch"]


@dataclass(eq=False)
class LoraBranch:
    """The hooks that add each token's own LoRA branch to the frozen layers of a model.

    Use as a context manager around forward passes; `tokens` or `rows` inside it say who owns what.

    Attributes:
        dropout: probability of dropping an input of the branch in training.
        generators: one random stream per client for dropout, so that nobody's draws depend on who
            shares the cohort.
        owners: which tokens belong to whom, as `tokens` was told.
        model: the frozen model.
        adapters: the factors of all clients, stacked.
        grouped: whether several clients' branches are made by grouped products, where a layer's
            sizes allow it; None leaves it to the device, see `products_grouped`.
    """

    model: nn.Module
    adapters: StackedAdapters
    dropout: float = 0.0
    generators: Sequence[torch.Generator] = ()
    owners: Sequence[tuple[int, slice]] = ()
    grouped: bool | None = None
    _factors: GroupedFactors | None = None
    _parts: dict[tuple[int, str], tuple[tuple[Tensor, ...], ...]] = field(default_factory=dict)
    _rows: Tensor | None = None
    _gathered: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> LoraBranch:
        modules = dict(self.model.named_modules())
        for target in self.adapters.targets:
            self._handles.append(
                modules[target.name].register_forward_hook(self._hook(*adapter_names(target)))
            )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within the block the model runs without this branch, which was entered."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    @contextmanager
    def tokens(self, owners: Sequence[tuple[int, slice]]) -> Iterator[None]:
        """Tokens of a flat row [1, N, ...] belong to clients by slices that follow each other.

        One owner owns any shape.
        """
        self.owners = owners
        try:
            yield
        finally:
            self.owners = ()

    @contextmanager
    def rows(self, clients: Sequence[int]) -> Iterator[None]:
        """Row j of a batch [n, L, ...] belongs to clients[j].

        For generation, so without gradients.
        """
        index = torch.tensor(clients, device=self.adapters.values.device)
        scales = torch.tensor(
            [self.adapters.scales[client] for client in clients], device=index.device
        )[:, None, None]
        gathered = {}
        for target in self.adapters.targets:
            name_a, name_b = adapter_names(target)
            gathered[name_a] = (
                self.adapters.stacked(name_a)[index].transpose(1, 2),
                (self.adapters.stacked(name_b)[index] * scales).transpose(1, 2),
            )
        self._rows, self._gathered = index, gathered
        try:
            yield
        finally:
            self._rows, self._gathered = None, {}

    def _hook(self, name_a: str, name_b: str) -> Any:
        def add_branch(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs = arguments[0]
            if self._rows is not None:
                factor_a, factor_b = self._gathered[name_a]
                by_row = inputs.float().reshape(
                    len(factor_a), -1, inputs.shape[-1]
                )  # some modules are given all rows in one
                branch = torch.bmm(torch.bmm(by_row, factor_a), factor_b)
                return (output + branch.view(output.shape)).to(output.dtype)
            assert self.owners, "a branch runs within tokens() or rows()"
            if self.dropout and torch.is_grad_enabled():
                inputs = self._dropped(inputs)
            if type(module) not in (nn.Linear, Conv1D):
                # A quantised layer may give a view of its own function's result, which must not be
                # changed
                output = output.clone()
            factors = self._grouped_factors(inputs)
            if factors is not None and factors.fits(name_a, name_b):
                return add_grouped(factors, (name_a, name_b), self.owners, inputs, output)
            sites = [self._site(client, part, name_a, name_b) for client, part in self.owners]
            result: Tensor = _AddBranches.apply(self.adapters.anchor, inputs, output, sites)  # type: ignore[no-untyped-call]
            return result

        return add_branch

    def _grouped_factors(self, inputs: Tensor) -> GroupedFactors | None:
        """The factors for one product of all clients; None where a loop over them is right."""
        if len(self.owners) == 1:  # of whatever shape
            return None
        grouped = self.grouped
        if grouped is None:
            grouped = products_grouped(self.adapters.values.device, inputs.dtype)
        if grouped and self._factors is None:
            self._factors = GroupedFactors(self.adapters)
        return self._factors if grouped else None

    def _site(self, client: int, tokens: slice, name_a: str, name_b: str) -> _Site:
        adapters = self.adapters
        if (
            client,
            name_a,
        ) not in self._parts:  # views, of which a cohort on many layers makes thousands
            matrices = (
                (adapters.values, adapters.gradients)
                if len(adapters.gradients)
                else (adapters.values,)
            )
            self._parts[client, name_a] = tuple(
                tuple(adapters.factor(matrix, client, name) for name in (name_a, name_b))
                for matrix in matrices
            )
        factors, *gradients = self._parts[client, name_a]
        return _Site(tokens, adapters.scales[client], factors, gradients[0] if gradients else ())

    def _dropped(self, inputs: Tensor) -> Tensor:
        """Inputs of the branch with some entries dropped, each client's by its own stream."""
        keep = torch.empty_like(inputs).flatten(0, -2)
        for client, tokens in self.owners:
            generator, part = self.generators[client], keep[tokens]
            kept = (
                sent(
                    torch.rand(part.shape, generator=generator, device=generator.device),
                    inputs.device,
                )
                >= self.dropout
            )
            part.copy_(kept / (1 - self.dropout))
        return inputs * keep.view(inputs.shape)


@dataclass(frozen=True, slots=True)
class _Site:
    """A client's branch at one layer.

    Its tokens, its factors A [r, inputs] and B [outputs, r], and where their gradients go.
    """

    tokens: slice
    scale: float
    factors: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


class _AddBranches(torch.autograd.Function):
    """Adds s B A x to the layer's output in place.

    The factors' gradients are summed where they are kept, in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, inputs: Tensor, output: Tensor, sites: list[_Site]
    ) -> Tensor:
        tokens, result = inputs.flatten(0, -2), output.flatten(0, -2)
        down = []
        for site in sites:
            factor_a, factor_b = (factor.to(inputs.dtype) for factor in site.factors)
            down.append(tokens[site.tokens] @ factor_a.T)
            result[site.tokens].addmm_(down[-1], factor_b.T, alpha=site.scale)
        ctx.mark_dirty(output)
        ctx.save_for_backward(inputs, *down)
        ctx.sites = sites
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, *down = ctx.saved_tensors
        tokens, of_output = inputs.flatten(0, -2), grad.flatten(0, -2)
        to_inputs = torch.empty_like(tokens) if ctx.needs_input_grad[1] else None
        for site, down_of in zip(ctx.sites, down, strict=True):
            factor_a, factor_b = (factor.to(grad.dtype) for factor in site.factors)
            part, of_part = tokens[site.tokens], of_output[site.tokens]
            to_down = (of_part @ factor_b).mul_(site.scale)
            for total, left, right, scale in zip(
                site.gradients, (to_down, of_part), (part, down_of), (1.0, site.scale), strict=True
            ):
                if total.dtype == grad.dtype:
                    total.addmm_(left.T, right, alpha=scale)
                else:
                    total.addmm_(
                        left.float().T, right.float(), alpha=scale
                    )  # nothing is rounded before it is summed
            if to_inputs is not None:
                torch.mm(to_down, factor_a, out=to_inputs[site.tokens])
        return None, None if to_inputs is None else to_inputs.view(inputs.shape), grad, None
