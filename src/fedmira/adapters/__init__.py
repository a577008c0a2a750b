"""Adapters: the thing that is trained, mixed and saved."""

from fedmira.adapters.arithmetic import (
    Adapter,
    all_finite,
    digest,
    distance,
    dot_products,
    map_tensors,
    norm,
    same_shapes,
    subtract,
    weighted_sum,
)
from fedmira.adapters.low_rank import Mixed, Split, cross_gram, gram, inner, mix, modules, product_norm, scale, truncate_rank

__all__ = [
    "Adapter",
    "Mixed",
    "Split",
    "all_finite",
    "cross_gram",
    "digest",
    "distance",
    "dot_products",
    "gram",
    "inner",
    "map_tensors",
    "mix",
    "modules",
    "norm",
    "product_norm",
    "same_shapes",
    "scale",
    "subtract",
    "truncate_rank",
    "weighted_sum",
]
