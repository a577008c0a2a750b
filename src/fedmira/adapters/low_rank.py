"""The algebra of LoRA updates s B A, done on the factors so that no full matrix is ever formed.

An update is the product of two factors per adapted module. The same product has many
factorisations, (B G)(G^-1 A) = B A, so whatever compares or averages tasks is measured on products:
inner products by traces, <s B A, t D C> = s t tr((B^T D)(C A^T)), and weighted sums by a QR-SVD of
the stacked factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedmira.adapters.arithmetic import Adapter
from fedmira.errors import RunError

__all__ = [
    "Mixed",
    "Split",
    "cross_gram",
    "gram",
    "inner",
    "mix",
    "module_grams",
    "modules",
    "product_norm",
    "scale",
    "sum_norm",
    "truncate_rank",
]

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
BLOCK_ENTRIES = 2**23
"""Most float64 entries of one block of factor products: 64 MiB."""

LEAST_SPLIT = 4
"""Matrices of so many times the rank and more are decomposed as far as the rank needs."""

LEAST_TURNED = 3**-0.5
"""Singular values of a turned A are at least this, the length of a row of PEFT's start."""

Factors = tuple[Tensor, Tensor]
Split = Literal["balanced", "flex", "turned"]
SHARE_OF_DOWN: Mapping[Split, float] = {"balanced": 0.5, "flex": 0.0, "turned": 0.0}
"""Exponent of the singular values that goes into A; the rest goes into B."""


@dataclass(frozen=True, slots=True)
class Mixed:
    """A weighted sum of updates, cut to a rank.

    Attributes:
        adapter: its factors, float32, with the names of the fallback adapter.
        tail: Frobenius norm of what the cut left out, over all modules; the best any adapter of
            that rank can do.
    """

    adapter: dict[str, Tensor]
    tail: float


def scale(alpha: float, rank: int, rslora: bool = False) -> float:
    """LoRA's factor s = alpha / r in front of B A; 1 for adapters without a rank, where r is 0.

    Rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732) has s = alpha / sqrt(r).

    >>> from fedmira.adapters import scale
    >>> scale(alpha=16.0, rank=8)
    2.0

    Args:
        alpha: LoRA's alpha.
        rank: of the adapter, 0 for kinds that have none.
        rslora: whether it is rank-stabilised.
    """
    if not rank:
        return 1.0
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def modules(adapter: Adapter) -> dict[str, Factors]:
    """Split a LoRA adapter into its modules.

    Returns:
        module name -> (A [r, in], B [out, r]), in the order of the adapter.

    Raises:
        RunError: a name is not a LoRA factor, a factor lacks its partner, or the two do not fit
            each other.
    """
    strangers = [name for name in adapter if not name.endswith((DOWN, UP))]
    problems = [
        f"adapter: {name!r} is not a LoRA factor (...{DOWN} or ...{UP}); a method that works on "
        "factors must return such names alone"
        for name in strangers
    ]
    found: dict[str, Factors] = {}
    for module in dict.fromkeys(
        name.removesuffix(DOWN).removesuffix(UP) for name in adapter if name not in strangers
    ):
        down, up = adapter.get(module + DOWN), adapter.get(module + UP)
        if down is None or up is None:
            problems.append(
                f"adapter: module {module!r} has only one of its two factors; it needs "
                "lora_A and lora_B"
            )
        elif down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            shapes = f"A {tuple(down.shape)}, B {tuple(up.shape)}"
            problems.append(
                f"adapter: module {module!r} has {shapes}; must be A [rank, in] and B "
                "[out, rank] of one rank"
            )
        else:
            found[module] = (down, up)
    if problems:
        raise RunError("\n".join(problems))
    return found


def truncate_rank(adapter: Adapter, rank: int) -> dict[str, Tensor]:
    """Keep the first `rank` rows of every A and columns of every B.

    How a common start is cut to a client's rank.

    Args:
        adapter: LoRA factors.
        rank: how many directions stay.

    Raises:
        RunError: a module has a smaller rank than asked for.
    """
    problems = [
        f"adapter: module {module!r} has rank {down.shape[0]}; cannot be cut to {rank} "
        f"(start from a rank of at least {rank})"
        for module, (down, _) in modules(adapter).items()
        if down.shape[0] < rank
    ]
    if problems:
        raise RunError("\n".join(problems))
    return {
        name: (tensor[:rank] if name.endswith(DOWN) else tensor[:, :rank]).clone()
        for name, tensor in adapter.items()
    }


def _stacked(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The factors of the sum of all parts, float64.

    A of all parts below each other [rho, in], and weight * B of all parts beside each other [out,
    rho].
    """
    down = torch.cat([down.to(torch.float64) for down, _ in parts])
    up = torch.cat(
        [up.to(torch.float64) * weight for (_, up), weight in zip(parts, weights, strict=True)],
        dim=1,
    )
    return down, up


def _owners(parts: Sequence[Factors]) -> Tensor:
    """Which part each of the rho stacked rows belongs to, int64 [rho]."""
    return torch.repeat_interleave(
        torch.arange(len(parts)), torch.tensor([down.shape[0] for down, _ in parts])
    )


def _module_gram(
    rows: Sequence[Factors],
    row_scales: Sequence[float],
    columns: Sequence[Factors],
    column_scales: Sequence[float],
) -> Tensor:
    """Inner products of one module's updates, float64 [rows, columns].

    They are made in blocks of rows, so that memory stays bounded.
    """
    column_down, column_up = _stacked(columns, column_scales)
    column_owners = _owners(columns)
    widest = max(down.shape[0] for down, _ in rows)
    step = max(1, BLOCK_ENTRIES // (widest * column_down.shape[0]))
    blocks = []
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        down, up = _stacked(part, row_scales[first : first + step])
        products = (up.T @ column_up) * (down @ column_down.T)
        by_row = torch.zeros(len(part), products.shape[1], dtype=torch.float64).index_add_(
            0, _owners(part), products
        )
        blocks.append(
            torch.zeros(len(part), len(columns), dtype=torch.float64).index_add_(
                1, column_owners, by_row
            )
        )
    return torch.cat(blocks)


def module_grams(
    rows: Sequence[Adapter],
    row_scales: Sequence[float],
    columns: Sequence[Adapter],
    column_scales: Sequence[float],
) -> Iterator[Tensor]:
    """Inner products of one module after the other, float64 [rows, columns] each.

    Modules come in order of their names.

    Args:
        rows: adapters, one for each row of a result.
        row_scales: s = alpha / r of each.
        columns: adapters, one for each column.
        column_scales: s = alpha / r of each.
    """
    row_modules, column_modules = (
        [modules(adapter) for adapter in rows],
        [modules(adapter) for adapter in columns],
    )
    for name in sorted(row_modules[0]) if rows and columns else ():
        row_parts, column_parts = (
            [each[name] for each in row_modules],
            [each[name] for each in column_modules],
        )
        yield _module_gram(row_parts, row_scales, column_parts, column_scales)


def cross_gram(
    rows: Sequence[Adapter],
    row_scales: Sequence[float],
    columns: Sequence[Adapter],
    column_scales: Sequence[float],
) -> Tensor:
    """Inner products <s_i B_i A_i, t_j D_j C_j> between two lists of adapters, summed over modules.

    All factors of a module are stacked, so the cost is two matrix products a module; ranks may
    differ. Modules are summed in order of their names, so that an adapter read back from a file
    gives the same bits.

    Args:
        rows: adapters with the factors A_i, B_i.
        row_scales: s_i = alpha / r of each.
        columns: adapters with the factors C_j, D_j.
        column_scales: t_j = alpha / r of each.

    Returns:
        float64 [rows, columns].
    """
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for products in module_grams(rows, row_scales, columns, column_scales):
        total += products
    return total


def gram(adapters: Sequence[Adapter], scales: Sequence[float]) -> Tensor:
    """Inner products of all pairs of updates s_i B_i A_i, float64 [K, K], exactly symmetric.

    Args:
        adapters: K adapters, whose ranks may differ.
        scales: s_i = alpha / r of each.
    """
    products = cross_gram(adapters, scales, adapters, scales)
    return (products + products.T) / 2


def inner(
    left: Adapter, right: Adapter, left_scale: float = 1.0, right_scale: float = 1.0
) -> float:
    """<s B A, t D C> summed over modules, in float64.

    Args:
        left: the adapter with the factors A, B.
        right: the adapter with the factors C, D; its rank may differ.
        left_scale: s.
        right_scale: t.
    """
    return float(cross_gram([left], [left_scale], [right], [right_scale]))


def product_norm(adapter: Adapter, scale: float = 1.0) -> float:
    """Frobenius norm of s B A over all modules, in float64.

    Args:
        adapter: LoRA factors.
        scale: s = alpha / r.
    """
    return math.sqrt(max(0.0, inner(adapter, adapter, scale, scale)))


def sum_norm(
    adapters: Sequence[Adapter], weights: Sequence[float], scales: Sequence[float]
) -> float:
    """Frobenius norm of sum_i weight_i * scale_i * B_i A_i over all modules, in float64.

    Of few directions a module's two small grams are formed, of many the sum itself, whichever is
    the less work.

    Args:
        adapters: of any ranks, all with the same modules.
        weights: one number an adapter.
        scales: alpha / rank of each.
    """
    split = [modules(adapter) for adapter in adapters]
    strengths = [weight * s for weight, s in zip(weights, scales, strict=True)]
    squared = 0.0
    for name in sorted(split[0]) if split else ():
        down, up = _stacked([parts[name] for parts in split], strengths)
        if down.shape[0] < min(up.shape[0], down.shape[1]):
            squared += float(((up.T @ up) * (down @ down.T)).sum())
        else:
            squared += float((up @ down).square().sum())
    return math.sqrt(max(0.0, squared))


@dataclass(frozen=True, slots=True)
class _Strongest:
    """The strongest part of a singular value decomposition.

    Attributes:
        left: vectors in columns [out, n].
        values: descending, [n].
        right: vectors in rows [n, in].
        rest: sum of the squares of all other values.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    rest: float = 0.0


def _singular(down: Tensor, up: Tensor, rank: int) -> _Strongest:
    """Singular value decomposition of up @ down, as far as a cut to a rank needs it.

    Two thin QR decompositions leave a small core of size rho; where rho is not small, the full
    matrix is no larger.
    """
    if down.shape[0] >= min(up.shape[0], down.shape[1]):
        return _strongest(up @ down, rank)
    up_basis, up_core = torch.linalg.qr(up)
    down_basis, down_core = torch.linalg.qr(down.T)
    core = _strongest(up_core @ down_core.T, rank)
    return replace(core, left=up_basis @ core.left, right=core.right @ down_basis.T)


def _strongest(matrix: Tensor, rank: int) -> _Strongest:
    """At least `rank` singular values and vectors of M, or all there are.

    Of a large matrix and a small rank the eigenvectors of M M^T span the strongest left vectors at
    half the cost. Within their span the decomposition is that of M itself, so that values far below
    the largest are not lost in its square.

    Args:
        matrix: M, float64 [out, in].
        rank: how many are needed.
    """
    if min(matrix.shape) < LEAST_SPLIT * rank:
        return _Strongest(*torch.linalg.svd(matrix, full_matrices=False))
    if matrix.shape[0] > matrix.shape[1]:
        turned = _strongest(matrix.T, rank)
        return replace(turned, left=turned.right.T, right=turned.left.T)
    span = torch.linalg.eigh(matrix @ matrix.T)[1][:, -2 * rank :]
    within = span.T @ matrix
    left, values, right = torch.linalg.svd(within, full_matrices=False)
    rest = float((matrix - span @ within).square().sum())
    return _Strongest(span @ left, values, right, rest)


def _refactor(
    down: Tensor, up: Tensor, rank: int, out_scale: float, fallback: Factors, split: Split
) -> tuple[Tensor, Tensor, float]:
    """Factors A, B of one module with out_scale * B A nearest to up @ down.

    With them comes the squared error.
    """
    old_down, old_up = fallback
    new_down, new_up = (
        old_down[:rank].to(torch.float64).clone(),
        torch.zeros(old_up.shape[0], rank, dtype=torch.float64),
    )
    found = _singular(down, up, rank)
    left, values, right = found.left, found.values, found.right
    # Directions below the rounding of float32 factors are noise; dropping them keeps a live row of
    # A for training instead.
    kept = min(rank, int((values > values[0] * torch.finfo(torch.float32).eps).sum()))
    if kept == rank and split == "turned":
        new_down, new_up = _turned(
            old_down[:rank].to(torch.float64),
            left[:, :rank] * (values[:rank] / out_scale),
            right[:rank],
        )
    elif kept:
        strongest = left[:, :kept].abs().argmax(dim=0, keepdim=True)
        sign = torch.where(left[:, :kept].gather(0, strongest) < 0, -1.0, 1.0).to(torch.float64)
        strength = values[:kept] / out_scale
        share = SHARE_OF_DOWN[split]
        new_down[:kept] = right[:kept] * sign.T * strength.pow(share)[:, None]
        new_up[:, :kept] = left[:, :kept] * sign * strength.pow(1 - share)
    error = float(values[kept:].square().sum()) + found.rest
    return new_down.to(old_down.dtype), new_up.to(old_up.dtype), error


def _turned(old_down: Tensor, left: Tensor, right: Tensor) -> Factors:
    """A and B of the product left @ right, with A the old one turned into the rows of `right`.

    With X mu Y^T the singular value decomposition of A_old V, V the columns of right^T, and mu no
    smaller than `LEAST_TURNED`: A = X mu Y^T V^T and B = U S Y mu^-1 X^T.

    Args:
        old_down: A_old [r, in].
        left: U S [out, r].
        right: V^T, orthonormal rows [r, in].
    """
    first, turned, last = torch.linalg.svd(old_down @ right.T)
    turned = turned.clamp_min(LEAST_TURNED)
    return (first * turned) @ last @ right, left @ (last.T / turned) @ first.T


def mix(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    scales: Sequence[float],
    rank: int,
    out_scale: float,
    fallback: Adapter,
    split: Split = "balanced",
) -> Mixed:
    """The adapter of the given rank nearest to sum_i weight_i * scale_i * B_i A_i, by module.

    The sum is formed exactly in float64 and cut by a singular value decomposition (Eckart-Young).
    Each left vector is signed so that its largest entry is positive. A sum with fewer directions
    than `rank` is filled up with the rows of the fallback's A at those places and zero columns of
    B, which changes nothing and leaves them free to learn; a sum that is zero altogether thus keeps
    the fallback's A, with B = 0.

    >>> import torch
    >>> from fedmira.adapters import mix
    >>> names = "q.lora_A.weight", "q.lora_B.weight"
    >>> one = dict(zip(names, (torch.ones(1, 2), torch.ones(2, 1))))
    >>> other = dict(zip(names, (torch.ones(1, 2), 3 * torch.ones(2, 1))))
    >>> mixed = mix([one, other], [0.5, 0.5], [1.0, 1.0], 1, 1.0, one).adapter
    >>> (mixed[names[1]] @ mixed[names[0]]).round(decimals=3)  # the mean of the products B A
    tensor([[2., 2.],
            [2., 2.]])

    Args:
        adapters: of any ranks, all with the same modules; those of weight 0 are skipped.
        weights: one number an adapter.
        scales: alpha / rank of each adapter.
        rank: of the receiver.
        out_scale: alpha / rank of the receiver.
        fallback: the receiver's present adapter, of `rank` or more.
        split: where the singular values S go: "balanced" puts sqrt(S) into both factors, "flex" all
            of S into B as FlexLoRA does, "turned" keeps the fallback's A as far as the sum allows,
            so that an optimizer finds the scale that it left; a sum of too few directions is split
            as by "flex".
    """
    chosen = [
        (modules(adapter), weight * s)
        for adapter, weight, s in zip(adapters, weights, scales, strict=True)
        if weight != 0
    ]
    result = {
        name: tensor[:rank] if name.endswith(DOWN) else torch.zeros_like(tensor[:, :rank])
        for name, tensor in fallback.items()
    }
    squared_tail = 0.0
    for module, factors in sorted(modules(fallback).items()) if chosen else ():
        down, up = _stacked(
            [parts[module] for parts, _ in chosen], [strength for _, strength in chosen]
        )
        result[module + DOWN], result[module + UP], error = _refactor(
            down, up, rank, out_scale, factors, split
        )
        squared_tail += error
    return Mixed(
        {name: tensor.contiguous() for name, tensor in result.items()}, math.sqrt(squared_tail)
    )
