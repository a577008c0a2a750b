"""Edge lists: graphs as float64 [E, 3] of row, column and weight.

Every pair stands once with row < column, in order, with a weight above 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NO_EDGES", "blended", "degrees_of", "joined", "list_of_matrix", "matrix_of_list"]

NO_EDGES = torch.zeros(0, 3, dtype=torch.float64)
"""The edge list of a graph without edges; never changed in place."""


def _edge_list(keys: Tensor, weights: Tensor, count: int) -> Tensor:
    """From row * count + column, ascending, and weights; those of weight 0 are left out."""
    listed = torch.stack(
        [(keys // count).to(torch.float64), (keys % count).to(torch.float64), weights], dim=1
    )
    return listed[weights > 0]


def _keys(edges: Tensor, count: int) -> Tensor:
    pairs = edges[:, :2].to(torch.int64)
    return pairs[:, 0] * count + pairs[:, 1]


def list_of_matrix(weights: Tensor) -> Tensor:
    """The edges of a symmetric matrix, float64 [K, K]; the lower half is not read."""
    rows, columns = torch.nonzero(torch.triu(weights, diagonal=1), as_tuple=True)
    return torch.stack(
        [
            rows.to(torch.float64),
            columns.to(torch.float64),
            weights[rows, columns].to(torch.float64),
        ],
        dim=1,
    )


def matrix_of_list(edges: Tensor, count: int) -> Tensor:
    """The symmetric matrix of an edge list, float64 [K, K]: for few clients.

    Args:
        edges: row, column and weight of each edge, float64 [E, 3].
        count: clients K.
    """
    weights = torch.zeros(count, count, dtype=torch.float64)
    rows, columns = edges[:, :2].to(torch.int64).unbind(dim=1)
    weights[rows, columns] = edges[:, 2]
    weights[columns, rows] = edges[:, 2]
    return weights


def degrees_of(edges: Tensor, count: int) -> Tensor:
    """Each client's sum of weights, float64 [K].

    Args:
        edges: row, column and weight of each edge, float64 [E, 3].
        count: clients K.
    """
    rows, columns = edges[:, :2].to(torch.int64).unbind(dim=1)
    return (
        torch.zeros(count, dtype=torch.float64)
        .index_add_(0, rows, edges[:, 2])
        .index_add_(0, columns, edges[:, 2])
    )


def joined(rows: Tensor, columns: Tensor, weights: Tensor, count: int) -> Tensor:
    """The edge list of pairs in any order and direction.

    Of a pair that comes more than once the largest weight counts.

    Args:
        rows, columns: the two clients of each pair, different from each other, int64 [n].
        weights: 0 or more, float64 [n]; pairs of weight 0 are left out.
        count: K.
    """
    keys, place = torch.unique(
        torch.minimum(rows, columns) * count + torch.maximum(rows, columns), return_inverse=True
    )
    largest = torch.zeros(len(keys), dtype=torch.float64).scatter_reduce_(0, place, weights, "amax")
    return _edge_list(keys, largest, count)


def blended(old: Tensor, new: Tensor, share: float, count: int) -> Tensor:
    """share * old + (1 - share) * new, edge by edge.

    Args:
        old: an edge list, float64 [E, 3].
        new: another one between the same clients.
        share: of the old one, 0 to 1.
        count: clients K.
    """
    keys, place = torch.unique(
        torch.cat([_keys(old, count), _keys(new, count)]), return_inverse=True
    )
    weights = torch.zeros(len(keys), dtype=torch.float64)
    weights[place[: len(old)]] += share * old[:, 2]
    weights[place[len(old) :]] += (1 - share) * new[:, 2]
    return _edge_list(keys, weights, count)
