"""One adapter made of several, and adapters cut to fewer directions: all on updates s B A.

An *update* is here a LoRA adapter whose scale stands in its B, so that adapters of other ranks,
scales and modules lie in one space. A module that an adapter does not have is an
update of zero there.

MetaGPT (Zhou et al. 2024, arXiv 2406.11385) weighs the updates tau_k by

    lambda_k = |tau_k|^2 / sum_l |tau_l|^2

which minimises sum_k |tau_k|^2 |theta - tau_k|^2 over theta, for any tau. TIES (Yadav et al. 2023,
arXiv 2306.01708) trims each tau_k to its largest entries, elects a sign for each entry, and takes
the mean of the entries that have it. Entries of factors mean nothing, as (B G)(G^-1 A) = B A, so
TIES is on the entries of the products, which are formed a module at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedmira.adapters.arithmetic import Adapter
from fedmira.adapters.low_rank import (
    DOWN,
    UP,
    Factors,
    Mixed,
    Split,
    gram,
    mix,
    modules,
)
from fedmira.errors import RunError

__all__ = [
    "folded",
    "metagpt_weights",
    "nearest",
    "padded",
    "rank_by_energy",
    "singular_values",
    "spare_directions",
    "ties",
    "update_gram",
]

_HIGH, _LOW = 2**15, 2**16
"""Values of the upper and the lower half of a float32's bits, of numbers that are not negative."""


def folded(adapter: Adapter, scales: Mapping[str, float]) -> dict[str, Tensor]:
    """The update: the adapter with its scale within B, float32 at least, the A as they are.

    Args:
        adapter: LoRA factors.
        scales: s of each module.

    Raises:
        RunError: a name is not a LoRA factor, or lacks its partner.
    """
    update: dict[str, Tensor] = {}
    for module, (down, up) in modules(adapter).items():
        exact = up.to(torch.float64) * scales[module]
        update[module + DOWN] = down
        update[module + UP] = exact.to(torch.promote_types(up.dtype, torch.float32))
    return update


def padded(updates: Sequence[Adapter]) -> list[dict[str, Tensor]]:
    """The updates with all modules that any of them has, those of rank 0 where it has none.

    Args:
        updates: of any ranks and modules.

    Raises:
        RunError: a module has other sizes in one than in another.
    """
    split = [modules(update) for update in updates]
    sizes: dict[str, tuple[int, int]] = {}
    problems = []
    for parts in split:
        for module, (down, up) in parts.items():
            own = (down.shape[1], up.shape[0])
            if sizes.setdefault(module, own) != own:
                problems.append(
                    f"adapters: module {module!r} is {own[0]} x {own[1]} in one and "
                    f"{sizes[module][0]} x {sizes[module][1]} in another; they are of other bases"
                )
    if problems:
        raise RunError("\n".join(dict.fromkeys(problems)))
    result = []
    for parts in split:
        whole: dict[str, Tensor] = {}
        for module, (inputs, outputs) in sorted(sizes.items()):
            nothing = (torch.zeros(0, inputs), torch.zeros(outputs, 0))
            whole[module + DOWN], whole[module + UP] = parts.get(module, nothing)
        result.append(whole)
    return result


def update_gram(updates: Sequence[Adapter]) -> Tensor:
    """Inner products of all pairs of updates, float64 [K, K].

    Args:
        updates: of any ranks and modules.
    """
    return gram(padded(updates), [1.0] * len(updates))


def metagpt_weights(updates: Sequence[Adapter]) -> list[float]:
    """lambda_k, which sum to 1: the squared norm of each update over that of all.

    >>> import torch
    >>> from fedmira.adapters import metagpt_weights
    >>> names = "q.lora_A.weight", "q.lora_B.weight"
    >>> of_norm = lambda norm: dict(zip(names, (torch.eye(1, 3), norm * torch.eye(2, 1))))
    >>> metagpt_weights([of_norm(1.0), of_norm(2.0)])
    [0.2, 0.8]

    Args:
        updates: of any ranks and modules; one of zero gets weight 0.

    Raises:
        RunError: all are zero.
    """
    squared = [
        float(gram(padded([update]), [1.0]).clamp_min(0)) if update else 0.0 for update in updates
    ]
    total = math.fsum(squared)
    if total <= 0:
        raise RunError(
            f"metagpt: all {len(updates)} adapters are zero, so they have no weights; train them, "
            "or merge by 'uniform'"
        )
    return [each / total for each in squared]


def spare_directions(updates: Sequence[Adapter], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """What stands in place of directions that a sum does not have: rows of A, and B = 0.

    Args:
        updates: whose rows are taken, in order; zeros where there are no more.
        ranks: module -> how many rows.
    """
    rows: dict[str, list[Tensor]] = {}
    outputs = {}
    for update in updates:
        for module, (down, up) in modules(update).items():
            missing = ranks.get(module, 0) - sum(map(len, rows.setdefault(module, [])))
            rows[module].append(down[: max(0, missing)].to(torch.float32))
            outputs[module] = len(up)
    result: dict[str, Tensor] = {}
    for module in [name for name in rows if name in ranks]:
        rank, found = ranks[module], torch.cat(rows[module])
        none = torch.zeros(rank - len(found), found.shape[1])
        result[module + DOWN] = torch.cat([found, none])
        result[module + UP] = torch.zeros(outputs[module], rank)
    return result


def nearest(
    updates: Sequence[Adapter],
    weights: Sequence[float],
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    fallback: Adapter,
    split: Split = "balanced",
) -> Mixed:
    """The adapter of these ranks and scales nearest to sum_k weight_k tau_k, by module.

    As `mix`, where modules differ in rank and scale, and updates in their modules.

    Args:
        updates: of any ranks and modules.
        weights: one number an update.
        ranks: of each module of the result, 1 or more; modules that are not in it are left out.
        scales: s of each module of the result.
        fallback: an adapter with these modules, of these ranks or more.
        split: as in `mix`.
    """
    split_up = [modules(update) for update in updates]
    result: dict[str, Tensor] = {}
    squared_tail = 0.0
    for module, factors in modules(fallback).items():
        if module not in ranks:
            continue
        parts = [
            (_named(module, of[module]), weight)
            for of, weight in zip(split_up, weights, strict=True)
            if module in of and of[module][0].shape[0]
        ]
        own, rank = _named(module, factors), ranks[module]
        adapters, shares = [part for part, _ in parts], [weight for _, weight in parts]
        mixed = mix(adapters, shares, [1.0] * len(parts), rank, scales[module], own, split)
        result |= mixed.adapter
        squared_tail += mixed.tail**2
    return Mixed(result, math.sqrt(squared_tail))


def singular_values(update: Adapter) -> dict[str, Tensor]:
    """Module -> the singular values of its product, descending, float64, as many as its rank.

    Args:
        update: LoRA factors with their scale.
    """
    found = {}
    for module, (down, up) in modules(update).items():
        left, right = up.to(torch.float64), down.to(torch.float64).T
        _, first = torch.linalg.qr(left)
        _, last = torch.linalg.qr(right)
        found[module] = torch.linalg.svdvals(first @ last.T)
    return found


def rank_by_energy(values: Mapping[str, Tensor], energy: float) -> int:
    """The smallest rank, the same in all modules, that keeps this share of the squared norm.

    Args:
        values: module -> singular values, descending.
        energy: share, above 0 and at most 1.

    Returns:
        The rank, 0 for an update of zero.
    """
    longest = max((len(of) for of in values.values()), default=0)
    squares = torch.zeros(longest, dtype=torch.float64)
    for of in values.values():
        squares[: len(of)] += of.square()
    kept = squares.cumsum(0)
    if not longest or kept[-1] <= 0:
        return 0
    enough = kept >= energy * kept[-1] * (1 - torch.finfo(torch.float64).eps * longest)
    return int(enough.to(torch.int64).argmax()) + 1


def ties(
    updates: Sequence[Adapter],
    keep: float,
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    fallback: Adapter,
) -> Mixed:
    """The adapter of these ranks nearest to the TIES merge of the updates, by module.

    Each update keeps its `keep` largest entries over all modules together; the sign of an entry is
    that of the sum of what is left of it; its value is the mean of those left that have the sign.
    The products are formed a module at a time in float32, and the result is cut by a dense singular
    value decomposition, so a module of n x n costs n^3.

    Args:
        updates: of any ranks and modules.
        keep: share of the entries that stay, above 0 and at most 1. The paper has 0.2.
        ranks: of each module of the result, 1 or more.
        scales: s of each module of the result.
        fallback: an adapter with these modules, of these ranks or more.
    """
    whole = [modules(update) for update in padded(updates)]
    names = sorted(whole[0]) if whole else []
    limits = [_least_kept(parts, names, keep) for parts in whole]
    result: dict[str, Tensor] = {}
    squared_tail = 0.0
    for module in names:
        trimmed = [
            torch.where(entries.abs() >= limit, entries, 0.0)
            for limit, entries in zip(limits, (_dense(of[module]) for of in whole), strict=True)
        ]
        merged = _disjoint_mean(trimmed)
        identity = torch.eye(merged.shape[0], dtype=torch.float64)
        dense = _named(module, (merged.to(torch.float64), identity))
        mixed = nearest([dense], [1.0], {module: ranks[module]}, scales, fallback)
        result |= mixed.adapter
        squared_tail += mixed.tail**2
    return Mixed(result, math.sqrt(squared_tail))


def _disjoint_mean(entries: Sequence[Tensor]) -> Tensor:
    """The mean of those of K numbers that have the sign of their sum, at each place."""
    total = torch.zeros_like(entries[0])
    for each in entries:
        total += each
    elected = total.sign()
    agreeing, count = torch.zeros_like(total), torch.zeros_like(total)
    for each in entries:
        agrees = (each.sign() == elected) & (elected != 0)
        agreeing += torch.where(agrees, each, 0.0)
        count += agrees
    return agreeing / count.clamp_min(1)


def _least_kept(parts: Mapping[str, Factors], names: Sequence[str], keep: float) -> float:
    """The magnitude from which on an update's entries stay: the largest that keeps enough.

    The bits of numbers that are not negative are ordered as the numbers are, so two counts of half
    the bits find it exactly, with one module in memory.
    """

    def magnitudes() -> Iterator[Tensor]:
        for module in names:
            yield _dense(parts[module]).abs().flatten().view(torch.int32)

    total = sum(parts[name][0].shape[1] * parts[name][1].shape[0] for name in names)
    wanted = max(1, math.ceil(keep * total))
    counts = torch.zeros(_HIGH, dtype=torch.int64)
    for bits in magnitudes():
        counts += torch.bincount(bits >> 16, minlength=_HIGH)
    high, above = _bin_of(counts, wanted)
    counts = torch.zeros(_LOW, dtype=torch.int64)
    for bits in magnitudes():
        counts += torch.bincount(bits[bits >> 16 == high] & (_LOW - 1), minlength=_LOW)
    low, _ = _bin_of(counts, wanted - above)
    return float(torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32))


def _bin_of(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the number at this place from the top, and how many lie above the bin."""
    from_top = counts.flip(0).cumsum(0)
    place = int((from_top >= wanted).to(torch.int64).argmax())
    above = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, above


def _dense(factors: Factors) -> Tensor:
    """B A, float32 [out, in]."""
    down, up = factors
    return up.to(torch.float32) @ down.to(torch.float32)


def _named(module: str, factors: Factors) -> dict[str, Tensor]:
    return {module + DOWN: factors[0], module + UP: factors[1]}
