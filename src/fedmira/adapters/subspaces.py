"""Where an update points to, whatever its size.

The column space of every module's B A, as an adapter of its own.

The cosines of the principal angles between two column spaces with orthonormal bases U and V (Bjorck
and Golub 1973) are the singular values of U^T V, so the sum of their squares is |U^T V|^2 = <U U^T,
V V^T>: an inner product of low-rank matrices, for which exact traces and sketches exist already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmira.adapters.arithmetic import Adapter
from fedmira.adapters.low_rank import DOWN, UP, modules

__all__ = ["column_spaces"]


def _basis(down: Tensor, up: Tensor) -> Tensor:
    """Orthonormal basis of the column space of up @ down, float64 [out, q].

    The rank q is 0 for a zero update.
    """
    basis, core = torch.linalg.qr(up.to(torch.float64))
    down_core = torch.linalg.qr(down.to(torch.float64).T).R
    left, values, _ = torch.linalg.svd(core @ down_core.T, full_matrices=False)
    # Float32 factors hold no direction below their rounding.
    size = int((values > values[0] * torch.finfo(torch.float32).eps).sum())
    space: Tensor = basis @ left[:, :size]
    return space


def column_spaces(adapter: Adapter) -> dict[str, Tensor]:
    """The projector on the column space of each module's B A, divided by its norm, as factors.

    With U [out, q] an orthonormal basis of the space, found by thin QR decompositions of B and A^T
    (nothing of size out x in or out x out is formed), the module becomes B' = U / q^(1/4), A' =
    B'^T, so that B' A' = U U^T / sqrt(q) has norm 1. The inner product of two such modules is sum_i
    cos^2(phi_i) / sqrt(q q'), phi_i the principal angles: 1 for equal spaces, 0 for orthogonal
    ones. It depends neither on the size of the update nor on how it is factored.

    Returns:
        Factors with the names of the adapter, float32: A' [q, out] and B' [out, q]; one direction
            of zeros for a module whose
        update is zero.
    """
    spaces = {}
    for name, (down, up) in modules(adapter).items():
        basis = _basis(down, up)
        size = basis.shape[1]
        column = (basis / size**0.25 if size else up.new_zeros(up.shape[0], 1)).to(torch.float32)
        spaces[name + DOWN], spaces[name + UP] = column.T.contiguous(), column
    return spaces
