"""Updates in coordinates that they have in common, and their mean by precisions there.

Entries of A and B mean nothing across adapters, as (B G)(G^-1 A) = B A for any G, so that a
precision of each entry would weigh what no two of them share. In coordinates of one set of
directions V, orthonormal and wide enough for all, an update is tau_k = C_k V, and C_k with V as its
A is a LoRA adapter with the same product: its precisions are squares of the gradient of its B.
Laplace approximations of K clients around their C_k, of diagonal precisions F_k, have the product

    C  =  sum_k F_k C_k / sum_k F_k            entry by entry

(Liu et al. 2021, arXiv 2102.01936, which the method `fola` does in every round).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmira.adapters.arithmetic import Adapter
from fedmira.adapters.low_rank import DOWN, UP, modules
from fedmira.adapters.merging import padded
from fedmira.errors import RunError

__all__ = ["common_directions", "in_directions", "mean_by_precision"]


def common_directions(updates: Sequence[Adapter]) -> dict[str, Tensor]:
    """Orthonormal rows that span the inputs of all updates, by module, float64 [D, in].

    They are the right singular vectors of the stacked updates, the strongest first, each signed so
    that its largest entry is positive; directions below float32's rounding of the strongest are
    left out. A module in which all updates are zero has none.

    Args:
        updates: LoRA factors with their scale in B, of any ranks and modules.
    """
    stacked: dict[str, list[Tensor]] = {}
    for update in padded(updates):
        for module, (down, up) in modules(update).items():
            # B = Q R with orthonormal Q, so that R A has the right vectors of B A.
            _, small = torch.linalg.qr(up.double())
            stacked.setdefault(module, []).append(small @ down.double())
    found = {}
    for module, parts in stacked.items():
        _, values, right = torch.linalg.svd(torch.cat(parts), full_matrices=False)
        least = torch.finfo(torch.float32).eps * float(values.max()) if len(values) else 0.0
        kept = right[values > least]
        signs = kept.gather(1, kept.abs().argmax(dim=1, keepdim=True)).sign()
        found[module] = kept * signs
    return found


def in_directions(update: Adapter, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An update with the directions as its A: the same product, float32.

    Args:
        update: one of those that the directions were made of.
        directions: as `common_directions` gives them.
    """
    result: dict[str, Tensor] = {}
    for module, (down, up) in modules(update).items():
        rows = directions[module]
        result[module + DOWN] = rows.float()
        result[module + UP] = (up.double() @ (down.double() @ rows.T)).float()
    return result


def mean_by_precision(values: Sequence[Tensor], precisions: Sequence[Tensor]) -> Tensor:
    """sum F_k C_k / sum F_k, entry by entry; where nobody observed anything, the mean. Float64.

    >>> import torch
    >>> from fedmira.adapters import mean_by_precision
    >>> one, three = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0])
    >>> seen = torch.tensor([1.0, 0.0])
    >>> mean_by_precision([one, three], [seen, 3 * seen]).tolist()
    [2.5, 2.0]

    Args:
        values: of one shape.
        precisions: of each value's entries, 0 or more, in the same shape.

    Raises:
        RunError: a precision is negative or not finite.
    """
    total = torch.zeros_like(values[0], dtype=torch.float64)
    weighted, plain = torch.zeros_like(total), torch.zeros_like(total)
    for value, precision in zip(values, precisions, strict=True):
        if not bool((precision >= 0).all()) or not bool(torch.isfinite(precision).all()):
            raise RunError("precision: an entry is negative or not finite; squares are neither")
        total += precision.double()
        weighted += precision.double() * value.double()
        plain += value.double() / len(values)
    return torch.where(total > 0, weighted / total, plain)
